//! Jobs: from an address and a name to their release.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Cluster, ClusterError, RACES_MAX, check_name};
use crate::{
    allocator::{Family, Pick, Recorded, Standing},
    directory::{DirectoryError, Expect, Outcome, Revision, Transaction, Versioned},
    records::{
        AddressRecord, BlockRecord, JobId, JobRecord, Owner, ReservationRecord, address_key, block_key, decode, encode,
        job_key, name_key, reservation_key,
    },
};

/// How often a transaction without an answer is sent again.
pub(super) const TRIES: usize = 3;
/// Most changes in doubt that are remembered. Beyond that the oldest is left to the next start's look for leaks.
const DOUBTS_MAX: usize = 1000;

/// What a new job is to have.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// From fresh entropy.
    pub id: JobId,
    /// Wanted name; must be free.
    pub name: String,
    /// The command, for listings.
    pub command: Vec<String>,
    /// Milliseconds since 1970, for listings.
    pub started_ms: u64,
    /// Which addresses.
    pub wanted: Wanted,
}

/// Which addresses a job is to have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Wanted {
    /// Any.
    #[default]
    Any,
    /// Those of the reservation of this name; families it has none of come from the node's blocks.
    Reservation(String),
    /// This one (and those reserved with it, if it is); the other family's comes from the node's blocks.
    Address(IpAddr),
}

/// How a change of owner ended. Both answers are final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transfer {
    /// The new owner, with its epoch.
    Won(Owner),
    /// Somebody else changed it before; who owns it now. `None`: there is no such job any more.
    Lost(Option<Owner>),
}

/// An address about to be given out: what its record is expected to be, and where it comes from.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) address: IpAddr,
    pub(super) before: Expect,
    /// `None` for an address that is not of a block of this node.
    pub(super) pick: Option<Pick>,
}

/// A job whose record may have been written though no answer came.
#[derive(Debug, Clone)]
pub(super) struct Doubt {
    record: JobRecord,
    claims: Vec<Claim>,
}

impl Claim {
    pub(super) fn of(pick: Pick) -> Self {
        let before = pick.leftover.map_or(Expect::Absent, Expect::Revision);
        Self { address: pick.address, before, pick: Some(pick) }
    }
}

impl Cluster {
    /// Gives a new job its addresses and makes this node its owner, at epoch 1: one transaction, unless others were faster.
    ///
    /// # Errors
    /// [`ClusterError::NameTaken`], [`ClusterError::BadName`], [`ClusterError::Exhausted`],
    /// [`ClusterError::AddressUnavailable`], [`ClusterError::NoReservation`], [`ClusterError::Directory`],
    /// [`ClusterError::Contended`].
    pub async fn create_job(&self, job: NewJob) -> Result<JobRecord, ClusterError> {
        check_name(&job.name)?;
        for _ in 0..RACES_MAX {
            let (reservation, claims) = self.claims(&job.wanted).await?;
            let Some(record) = self.record_of(&job, reservation.as_ref(), &claims) else {
                self.put_back(&claims, None);
                return Err(DirectoryError::Storage("the cluster has no IPv4 prefix".to_owned()).into());
            };
            let key = job_key(&job.id);
            let encoded = encode(&record);
            let mut transaction = Transaction::default()
                // First, so that a try that was made without our knowing shows itself.
                .expect(&key, Expect::Absent)
                .expect(name_key(&job.name), Expect::Absent)
                .put(&key, encoded.clone())
                .put(name_key(&job.name), encode(&job.id));
            if let Some(reservation) = &reservation {
                let unchanged = Expect::value(encode(reservation));
                transaction = transaction.expect(reservation_key(&reservation.name), unchanged);
            }
            let held = encode(&AddressRecord::Held { job: job.id.clone() });
            transaction = self.with_claims(transaction, &claims, &held);
            match self.transact_settled(&transaction, &key, &encoded).await {
                Ok(Outcome::Done(revision)) => {
                    self.confirm(&claims, revision);
                    return Ok(record);
                }
                Ok(Outcome::Conflict { key: lost, found }) => {
                    match self.lost_race(&claims, &lost, found.as_ref()).await {
                        // The job that had the address has just ended; it is its reservation's again.
                        Err(ClusterError::AddressUnavailable { .. }) if is_reserved(&lost, found.as_ref()) => continue,
                        other => other?,
                    }
                    if lost == key {
                        return Err(DirectoryError::Invalid(format!("a job {} exists already", job.id)).into());
                    }
                    if let (true, Some(found)) = (lost == name_key(&job.name), found) {
                        let holder: JobId = decode(&lost, &found.value)?;
                        return Err(ClusterError::NameTaken { name: job.name, job: holder.to_string() });
                    }
                }
                Err(error @ DirectoryError::Unknown(_)) => {
                    // The addresses stay held until it is known what became of them ([`Cluster::maintain`]).
                    let mut state = self.state();
                    if state.doubtful.len() < DOUBTS_MAX {
                        state.doubtful.push(Doubt { record, claims });
                    }
                    return Err(error.into());
                }
                Err(error) => {
                    self.put_back(&claims, None);
                    return Err(error.into());
                }
            }
        }
        Err(ClusterError::Contended)
    }

    fn record_of(&self, job: &NewJob, reservation: Option<&ReservationRecord>, claims: &[Claim]) -> Option<JobRecord> {
        let address = claims.iter().find_map(|claim| match claim.address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        })?;
        let address6 = claims.iter().find_map(|claim| match claim.address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        });
        Some(JobRecord {
            id: job.id.clone(),
            name: job.name.clone(),
            address,
            address6,
            reservation: reservation.map(|reservation| reservation.name.clone()),
            home: None,
            owner: Owner { node: self.node.name.clone(), epoch: 1 },
            command: job.command.clone(),
            started_ms: job.started_ms,
        })
    }

    /// Picks one address of each family.
    async fn claims(&self, wanted: &Wanted) -> Result<(Option<ReservationRecord>, Vec<Claim>), ClusterError> {
        let (reservation, mut claims) = match wanted {
            Wanted::Any => (None, Vec::new()),
            Wanted::Reservation(name) => self.claims_of_reservation(name).await?,
            Wanted::Address(address) => {
                let key = address_key(*address);
                match self.directory.get(&key).await? {
                    Some(found) => match decode(&key, &found.value)? {
                        AddressRecord::Reserved { name } => self.claims_of_reservation(&name).await?,
                        _ => (None, vec![self.claim_address(*address).await?]),
                    },
                    None => (None, vec![self.claim_address(*address).await?]),
                }
            }
        };
        let families: Vec<_> = self.record().families().collect();
        for family in families {
            if !claims.iter().any(|claim| Family::of(claim.address) == family) {
                match self.claim_any(family).await {
                    Ok(claim) => claims.push(claim),
                    Err(error) => {
                        self.put_back(&claims, None);
                        return Err(error);
                    }
                }
            }
        }
        Ok((reservation, claims))
    }

    /// The addresses of a reservation; they have no record of another job then.
    async fn claims_of_reservation(&self, name: &str) -> Result<(Option<ReservationRecord>, Vec<Claim>), ClusterError> {
        check_name(name)?;
        let key = reservation_key(name);
        let Some(found) = self.directory.get(&key).await? else {
            return Err(ClusterError::NoReservation(name.to_owned()));
        };
        let reservation: ReservationRecord = decode(&key, &found.value)?;
        let reserved = encode(&AddressRecord::Reserved { name: name.to_owned() });
        let claim = |address: &IpAddr| Claim { address: *address, before: Expect::value(reserved.clone()), pick: None };
        let claims = reservation.addresses.iter().map(claim).collect();
        Ok((Some(reservation), claims))
    }

    /// One address in particular.
    pub(super) async fn claim_address(&self, address: IpAddr) -> Result<Claim, ClusterError> {
        let unavailable = |why: String| Err(ClusterError::AddressUnavailable { address, why });
        let record = self.record();
        let Some(prefix) = record.prefix_of(address) else {
            return unavailable(format!("the cluster's addresses are those of {}", record.prefixes_in_words()));
        };
        let block = match IpNet::new(address, prefix.block_length) {
            Ok(net) => net.trunc(),
            Err(_) => return Err(DirectoryError::Storage("the cluster's record is damaged".to_owned()).into()),
        };
        for _ in 0..RACES_MAX {
            let taken = self.state().allocator.take(address, self.now());
            match taken {
                Ok(pick) => return Ok(Claim::of(pick)),
                Err(Standing::Special) => {
                    return unavailable(format!("it has a meaning of its own in {}; take another", prefix.net));
                }
                Err(Standing::Held) => return unavailable("it is in use or reserved; see `migd addr ls`".to_owned()),
                Err(Standing::Resting(left)) => {
                    return unavailable(format!(
                        "it was freed lately and rests for {} s more, so that no old packet reaches its next user",
                        left.as_secs() + 1
                    ));
                }
                Err(Standing::Free | Standing::Foreign) => {}
            }
            match self.block_recorded(block).await? {
                Some((there, _)) if there.node != self.node.name => {
                    // Its holder finds the address taken when it tries to give it out.
                    return Ok(Claim { address, before: Expect::Absent, pick: None });
                }
                _ => self.lease(block).await?,
            }
        }
        Err(ClusterError::Contended)
    }

    /// Adds to a transaction what claims need: conditions, the addresses' new record, and leases of fresh blocks.
    pub(super) fn with_claims(&self, mut transaction: Transaction, claims: &[Claim], record: &[u8]) -> Transaction {
        for claim in claims {
            // The block first: when it was lost, its new holder has perhaps given out the address as well, and who has the
            // block is what is to be learnt then.
            if let Some(pick) = &claim.pick {
                let block = block_key(pick.block);
                transaction = match pick.lease {
                    Some(lease) => transaction.expect(block, Expect::Revision(lease)),
                    None => transaction.expect(&block, Expect::Absent).put(&block, encode(&self.lease_of(pick.block))),
                };
            }
            let key = address_key(claim.address);
            transaction = transaction.expect(&key, claim.before.clone()).put(&key, record.to_vec());
        }
        transaction
    }

    pub(super) fn lease_of(&self, net: IpNet) -> BlockRecord {
        BlockRecord { net, node: self.node.name.clone(), incarnation: self.state().incarnation }
    }

    /// The claims were recorded at this revision.
    pub(super) fn confirm(&self, claims: &[Claim], revision: Revision) {
        let mut state = self.state();
        for claim in claims {
            match &claim.pick {
                Some(pick) if pick.lease.is_none() => {
                    let held = [(claim.address, Recorded::Held(revision))].into();
                    state.allocator.add_block(pick.block, revision, &held, self.now());
                    state.leased.insert(pick.block, self.node.name.clone());
                    state.races_lost = 0;
                }
                Some(pick) => state.allocator.confirm(pick, revision),
                // If it is of a block of this node after all (a reservation), it is held there already.
                None => {}
            }
        }
    }

    /// The claims were not recorded and never will be; but for the one under `except`, whose state is to be corrected.
    pub(super) fn put_back(&self, claims: &[Claim], except: Option<&str>) {
        let mut state = self.state();
        for pick in claims.iter().filter_map(|claim| claim.pick.as_ref()).filter(|pick| pick.lease.is_some()) {
            if except != Some(address_key(pick.address).as_str()) {
                state.allocator.put_back(pick);
            }
        }
    }

    /// A transaction failed on the key `lost`: learns from what was found there.
    ///
    /// # Errors
    /// When an address that was asked for can't be had, or the directory doesn't answer.
    pub(super) async fn lost_race(
        &self,
        claims: &[Claim],
        lost: &str,
        found: Option<&Versioned>,
    ) -> Result<(), ClusterError> {
        self.put_back(claims, Some(lost));
        for claim in claims {
            let of_address = address_key(claim.address) == lost;
            match &claim.pick {
                None if of_address => return Err(self.unavailable(claim.address, lost, found)?),
                Some(pick) if block_key(pick.block) == lost => {
                    self.learn_lease(pick.block, found).await?;
                    if pick.lease.is_none() {
                        self.lost_fresh_block().await?;
                    }
                    return Ok(());
                }
                Some(pick) if of_address => {
                    let recorded = found.map(|found| recorded(lost, found)).transpose()?;
                    self.state().allocator.correct(claim.address, recorded, self.now());
                    // There is more about this block than was believed.
                    if pick.lease.is_none() {
                        self.lease(pick.block).await?;
                    } else {
                        self.reconcile_block(pick.block).await?;
                    }
                    return Ok(());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn unavailable(&self, address: IpAddr, key: &str, found: Option<&Versioned>) -> Result<ClusterError, ClusterError> {
        let why = match found.map(|found| decode(key, &found.value)).transpose()? {
            None => "its reservation was given up just now".to_owned(),
            Some(AddressRecord::Held { job }) => {
                format!("job {} has it; see `migd ps`, or end that job", job.short())
            }
            Some(AddressRecord::Reserved { name }) => format!("it is reserved as {name:?}; use `--address {name}`"),
            Some(AddressRecord::Resting { .. }) => {
                "it was freed lately and rests; try again in five minutes".to_owned()
            }
        };
        Ok(ClusterError::AddressUnavailable { address, why })
    }

    /// A transaction whose answer got lost is sent again: when it had been made, the key that it wrote first shows it.
    pub(super) async fn transact_settled(
        &self,
        transaction: &Transaction,
        key: &str,
        written: &[u8],
    ) -> Result<Outcome, DirectoryError> {
        let mut doubt = None;
        for _ in 0..TRIES {
            match (self.directory.transact(transaction).await, &doubt) {
                (Err(error @ DirectoryError::Unknown(_)), _) => doubt = Some(error),
                // Nothing was done this time, but before, perhaps.
                (Err(_), Some(_)) => {}
                (Ok(Outcome::Conflict { key: lost, found: Some(found) }), Some(_))
                    if lost == key && found.value == written =>
                {
                    return Ok(Outcome::Done(found.revision));
                }
                (other, _) => return other,
            }
        }
        Err(doubt.unwrap_or_else(|| DirectoryError::Unreachable("it did not answer".to_owned())))
    }

    /// Finds out what became of jobs whose creation was not answered, and undoes what was made. Nobody runs them: who asked
    /// for them was told that it failed.
    ///
    /// # Errors
    /// [`ClusterError::Directory`]; the rest is tried the next time.
    pub(super) async fn settle_doubts(&self) -> Result<(), ClusterError> {
        loop {
            let Some(Doubt { record, claims }) = self.state().doubtful.last().cloned() else { return Ok(()) };
            let id = record.id.clone();
            // The old transaction may still be on its way. Once what it expects has changed it can't be made any more.
            let resting = encode(&AddressRecord::Resting { last: Some(record.id.clone()) });
            let mut fence = Transaction::default().expect(job_key(&record.id), Expect::Absent);
            let fenced: Vec<_> = claims.iter().filter(|claim| !matches!(claim.before, Expect::Value(_))).collect();
            for claim in &fenced {
                let key = address_key(claim.address);
                fence = fence.expect(&key, claim.before.clone()).put(&key, resting.clone());
            }
            if let Some(name) = &record.reservation {
                let key = reservation_key(name);
                if let Some(found) = self.directory.get(&key).await? {
                    let mut reservation: ReservationRecord = decode(&key, &found.value)?;
                    reservation.generation += 1;
                    fence = fence.expect(&key, Expect::Revision(found.revision)).put(&key, encode(&reservation));
                }
            }
            match self.directory.transact(&fence).await? {
                Outcome::Done(revision) => {
                    let mut state = self.state();
                    for claim in &fenced {
                        if let Some(pick) = &claim.pick {
                            state.allocator.confirm(pick, revision.saturating_sub(1));
                        }
                        state.allocator.rest(claim.address, revision, self.now());
                    }
                }
                Outcome::Conflict { key, .. } if key == job_key(&record.id) => {
                    self.confirm(&claims, 0);
                    self.release(&record).await?;
                }
                Outcome::Conflict { key, .. }
                    if record.reservation.is_some_and(|name| key == reservation_key(&name)) =>
                {
                    continue;
                }
                Outcome::Conflict { key, found } => {
                    // Somebody changed one of the addresses, so the old transaction can't be made any more either.
                    let found = found.map(|found| recorded(&key, &found)).transpose()?;
                    self.put_back(&claims, Some(&key));
                    for claim in claims.iter().filter(|claim| claim.pick.is_some() && address_key(claim.address) == key)
                    {
                        self.state().allocator.correct(claim.address, found, self.now());
                    }
                }
            }
            self.state().doubtful.retain(|doubt| doubt.record.id != id);
        }
    }

    /// The one change of owner: from exactly this owner to a node, at the next epoch. The job's addresses and sockets are
    /// afterwards at `home`, or where the job runs. With `known`, a record of the job from any time, it is a single request.
    ///
    /// With `to` being the present node it is a fence: whoever else tries to take over from the same epoch loses.
    ///
    /// # Errors
    /// [`DirectoryError::Unknown`] means it may have been done: ask again with [`Cluster::job`].
    pub async fn transfer(
        &self,
        id: &JobId,
        from: &Owner,
        to: &str,
        home: Option<&str>,
        known: Option<&JobRecord>,
    ) -> Result<Transfer, ClusterError> {
        let key = job_key(id);
        // All but the owner and the home is the same for the job's whole life.
        let believed =
            known.filter(|known| known.id == *id).map(|known| JobRecord { owner: from.clone(), ..known.clone() });
        let mut next = believed.map(|record| (Expect::value(encode(&record)), record));
        loop {
            let (before, mut record) = match next.take() {
                Some(next) => next,
                None => match self.read_job(&key).await? {
                    Some((record, revision)) => (Expect::Revision(revision), record),
                    None => return Ok(Transfer::Lost(None)),
                },
            };
            if record.owner != *from {
                return Ok(Transfer::Lost(Some(record.owner)));
            }
            record.owner = Owner { node: to.to_owned(), epoch: from.epoch + 1 };
            record.home = home.filter(|home| *home != to).map(str::to_owned);
            let swap = Transaction::default().expect(&key, before).put(&key, encode(&record));
            match self.directory.transact(&swap).await? {
                Outcome::Done(_) => return Ok(Transfer::Won(record.owner)),
                // Another field of the record changed, or the owner did.
                Outcome::Conflict { found: None, .. } => return Ok(Transfer::Lost(None)),
                Outcome::Conflict { found: Some(found), .. } => {
                    next = Some((Expect::Revision(found.revision), decode(&key, &found.value)?));
                }
            }
        }
    }

    /// Ends a job that this owner has: its name is free at once, its addresses after their rest (those of a reservation at
    /// once, for the next job of the reservation). Says whether it was done; `false` means that somebody else owns it
    /// now, or that it is gone.
    ///
    /// # Errors
    /// [`ClusterError::Directory`].
    pub async fn release(&self, record: &JobRecord) -> Result<bool, ClusterError> {
        let key = job_key(&record.id);
        let mut record = record.clone();
        let mut before = Expect::value(encode(&record));
        loop {
            let mut release = Transaction::default().expect(&key, before).delete(&key).delete(name_key(&record.name));
            let mut kept = Vec::new();
            if let Some(name) = &record.reservation {
                let reservation = reservation_key(name);
                let found = self.directory.get(&reservation).await?;
                let unchanged = found.as_ref().map_or(Expect::Absent, |found| Expect::Revision(found.revision));
                release = release.expect(&reservation, unchanged);
                if let Some(found) = found {
                    kept = decode::<ReservationRecord>(&reservation, &found.value)?.addresses;
                }
            }
            for address in record.addresses() {
                let after = match &record.reservation {
                    Some(name) if kept.contains(&address) => AddressRecord::Reserved { name: name.clone() },
                    _ => AddressRecord::Resting { last: Some(record.id.clone()) },
                };
                release = release.put(address_key(address), encode(&after));
            }
            match self.directory.transact(&release).await? {
                Outcome::Done(revision) => {
                    let mut state = self.state();
                    for address in record.addresses().filter(|address| !kept.contains(address)) {
                        state.allocator.rest(address, revision, self.now());
                    }
                    return Ok(true);
                }
                Outcome::Conflict { key: lost, found } if lost == key => {
                    let Some(found) = found else { return Ok(false) };
                    let there: JobRecord = decode(&key, &found.value)?;
                    if there.owner != record.owner {
                        return Ok(false);
                    }
                    before = Expect::Revision(found.revision);
                    record = there;
                }
                // The reservation changed.
                Outcome::Conflict { .. } => before = Expect::value(encode(&record)),
            }
        }
    }

    /// Takes note that a job is gone, by the change of this revision that removed its record, so that its addresses, if
    /// they are of this node's blocks, can be used again after their rest. Call it for each deletion that
    /// [`Cluster::watch_jobs`] reports.
    pub fn note_released(&self, record: &JobRecord, revision: Revision) {
        if record.reservation.is_none() {
            let mut state = self.state();
            for address in record.addresses() {
                state.allocator.rest(address, revision, self.now());
            }
        }
    }
}

/// Whether this is the record of an address that waits for its reservation's next job.
fn is_reserved(key: &str, found: Option<&Versioned>) -> bool {
    found.is_some_and(|found| matches!(decode(key, &found.value), Ok(AddressRecord::Reserved { .. })))
}

/// What the allocator is to know of an address's record.
pub(super) fn recorded(key: &str, found: &Versioned) -> Result<Recorded, DirectoryError> {
    Ok(match decode(key, &found.value)? {
        AddressRecord::Held { .. } | AddressRecord::Reserved { .. } => Recorded::Held(found.revision),
        AddressRecord::Resting { .. } => Recorded::Resting(found.revision),
    })
}
