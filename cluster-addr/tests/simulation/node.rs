//! What a node does: what its daemon would, with jobs that only exist in the world's books.

use std::sync::Arc;
use std::time::Duration;

use cluster_addr::cluster::Clock;
use cluster_addr::{Cluster, JobId, JobRecord, NewJob, NodeRecord, Transfer, Wanted};

use crate::world::{Line, Shared, World, lock, sleep};

/// Jobs of a node beyond which it rather ends one.
const JOBS_MAX: usize = 150;
const RETRY: Duration = Duration::from_millis(500);

/// One start of a daemon, until it crashes or everything is over.
pub async fn live(world: Shared, node: usize) {
    let name = format!("n{node}");
    let (line, cluster) = loop {
        let line = Arc::new(Line { world: Arc::clone(&world), node });
        let record = NodeRecord { name: name.clone(), peer: ([10, 99, 0, 1], 7070).into(), hops: vec![] };
        // Each start has a clock of its own, that began at some time.
        let began = lock(&world).now;
        let offset = Duration::from_secs(lock(&world).dice.below(1 << 30));
        let clock: Clock = {
            let world = Arc::clone(&world);
            Arc::new(move || lock(&world).now.saturating_sub(began) + offset)
        };
        match Cluster::open_with_clock(line.clone(), record, clock).await {
            Ok(cluster) => break (line, cluster),
            Err(_) => sleep(&world, node, RETRY).await,
        }
    };
    let me = Node { world, node, name, line, cluster };
    me.settle().await;
    while !lock(&me.world).is_over() {
        let pause = lock(&me.world).dice.millis(0, 8000);
        sleep(&me.world, node, pause).await;
        me.act().await;
    }
    // Others may have left something in doubt: until all is quiet.
    for _ in 0..4 {
        sleep(&me.world, node, Duration::from_secs(60)).await;
        let _ = me.cluster.maintain().await;
        me.settle().await;
    }
}

struct Node {
    world: Shared,
    node: usize,
    name: String,
    line: Arc<Line>,
    cluster: Cluster,
}

impl Node {
    async fn pause(&self) {
        sleep(&self.world, self.node, RETRY).await;
    }

    /// What the directory says is this node's, and what runs here, are made to agree.
    async fn settle(&self) {
        let records = loop {
            match self.line.owned(&self.name).await {
                Ok(records) => break records,
                Err(_) => self.pause().await,
            }
        };
        for record in records {
            let adopt = {
                let mut world = lock(&self.world);
                let known = world.running.get(&record.id).map(|(at, known)| (at, known.owner.epoch));
                match known {
                    Some((at, _)) if at == self.node => continue,
                    // Frozen in the middle of its way here: it belongs to this node.
                    Some((_, epoch)) if epoch < record.owner.epoch => {
                        world.move_to(self.node, record.clone());
                        true
                    }
                    Some(_) => true,
                    None => false,
                }
            };
            if !adopt {
                self.release(&record).await;
            }
        }
    }

    async fn act(&self) {
        let (jobs, choice) = {
            let mut world = lock(&self.world);
            (world.running.count(self.node), world.dice.below(100))
        };
        match choice {
            0..4 => drop(self.cluster.maintain().await),
            4..12 => self.fetch().await,
            12..55 if jobs < JOBS_MAX => self.take().await,
            _ => {
                let chosen = {
                    let World { running, dice, .. } = &mut *lock(&self.world);
                    running.any_of(self.node, dice)
                };
                match chosen {
                    Some(record) => {
                        lock(&self.world).end(&record.id);
                        self.release(&record).await;
                    }
                    None => self.take().await,
                }
            }
        }
    }

    async fn take(&self) {
        let id = {
            let mut world = lock(&self.world);
            let mut entropy = [0; 12];
            entropy[..8].copy_from_slice(&world.dice.next().to_le_bytes());
            entropy[8..].copy_from_slice(&world.dice.next().to_le_bytes()[..4]);
            JobId::from_entropy(entropy)
        };
        let name = format!("j-{id}");
        let job = NewJob { id, name, command: vec![], started_ms: 0, wanted: Wanted::Any };
        if let Ok(record) = self.cluster.create_job(job).await {
            lock(&self.world).begin(self.node, record);
        }
    }

    /// Takes a job over from another node, which lets it go: as at the commit of a move.
    async fn fetch(&self) {
        let chosen = {
            let World { running, dice, .. } = &mut *lock(&self.world);
            running.any_of_others(self.node, dice)
        };
        let Some(record) = chosen else { return };
        loop {
            let answer = self.cluster.transfer(&record.id, &record.owner, &self.name, None, Some(&*record)).await;
            let owner = match answer {
                Ok(Transfer::Won(owner)) => owner,
                // An earlier try had won.
                Ok(Transfer::Lost(Some(owner))) if owner.node == self.name && owner.epoch == record.owner.epoch + 1 => {
                    owner
                }
                Ok(Transfer::Lost(_)) => return,
                Err(_) => {
                    self.pause().await;
                    continue;
                }
            };
            let mut world = lock(&self.world);
            let there = world.running.get(&record.id).map(|(_, there)| there.owner.epoch);
            match there {
                Some(epoch) if epoch < owner.epoch => {
                    world.move_to(self.node, JobRecord { owner, ..JobRecord::clone(&record) });
                }
                // Its end came first, at the source; or it was settled already.
                _ => {}
            }
            return;
        }
    }

    async fn release(&self, record: &JobRecord) {
        while self.cluster.release(record).await.is_err() {
            self.pause().await;
        }
    }
}
