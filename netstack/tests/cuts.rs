//! Freeze and thaw at any point of anything: the thawed stack emits exactly the segments that the unfrozen one did.
//!
//! A trace is everything that happened to one of the hosts of a simulated world (listeners with SYN queues and cookies,
//! every state, loss, reordering, timers, both families, ECN) and what came of it. For each chosen cut the trace is played to a
//! stack up to there; it is frozen, encoded, decoded and thawed; and the rest of the trace must bring forth the same
//! packets, answers and notices, byte by byte. `CUTS=n` sets how many pairs of trace and cut are tried.

mod harness;

use harness::Random;
use harness::actor::{Op, Trace, apply};
use harness::world::{Plan, World};
use netstack::{Config, Instant, Secrets, Stack, StackImage};

/// Steps of the rest of a trace that are compared; time-outs of minutes lie within them.
const REST_MAX: usize = 250;

fn frozen(stack: &Stack, now: Instant) -> Vec<u8> {
    codec::to_vec(&stack.freeze(now)).expect("an image can be written")
}

/// Tries cuts of one trace, each with a chance of `density`. Returns how many were tried.
fn try_cuts(what: &str, trace: &Trace, fresh: Stack, density: f64, random: &mut Random) -> usize {
    let mut stack = fresh;
    let mut cuts = 0;
    for (at, (now, op, done)) in trace.iter().enumerate() {
        assert_eq!(apply(&mut stack, *now, op), *done, "{what}: playing a trace again gives something else at {at}");
        if !random.chance(density) {
            continue;
        }
        cuts += 1;
        let bytes = frozen(&stack, *now);
        let image: StackImage = codec::from_slice(&bytes).expect("an image can be read");
        // The clock that it goes on by began with it.
        let began = *now;
        let booted = |now: &Instant| Instant::from_nanos(7) + now.since(began);
        let mut thawed =
            Stack::thaw_silently(image, booted(now), stack.config().clone()).expect("an image can be thawed");
        assert!(frozen(&thawed, booted(now)) == bytes, "{what}: cut {at}: the thawed stack has another image");
        for (later, (now, op, done)) in trace.iter().enumerate().skip(at + 1).take(REST_MAX) {
            if matches!(op, Op::Timeout) && !done.packets.is_empty() {
                let is_due = thawed.poll_timeout().is_some_and(|due| due <= booted(now));
                assert!(
                    is_due,
                    "{what}: cut after step {at}, at step {later}: the thawed stack doesn't know that it is due"
                );
            }
            let now_done = apply(&mut thawed, booted(now), op);
            assert!(
                now_done == *done,
                "{what}: cut after step {at}, at step {later}, {op:?}\nunfrozen: {done:?}\nthawed: {now_done:?}"
            );
        }
    }
    cuts
}

/// Traces of both hosts of a world, with stacks as they were before anything happened.
fn traces(seed: u64) -> Vec<(Trace, Stack)> {
    let mut plan = Plan::random(seed);
    plan.faults.moves = 0.0;
    plan.record = true;
    plan.bytes_max = plan.bytes_max.min(20_000);
    let mut world = World::new(plan);
    let beginnings = world.beginnings();
    if let Err(what) = world.run() {
        panic!("seed {seed}: {what}");
    }
    let traces = world.actors.into_iter().filter_map(|actor| actor.trace);
    let fresh = |(config, secrets, now): (Config, Secrets, Instant)| Stack::new(config, secrets, now);
    traces.zip(beginnings).map(|(trace, beginning)| (trace, fresh(beginning))).collect()
}

#[test]
fn cut_anywhere() {
    let wanted = std::env::var("CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_500);
    let mut random = Random::new(77);
    let mut cuts = 0;
    let mut steps = 0;
    let mut seed = 500_000;
    while cuts < wanted {
        for (index, (trace, fresh)) in traces(seed).into_iter().enumerate() {
            steps += trace.len();
            // Some forty cuts of each, wherever they fall.
            let density = (40.0 / trace.len().max(1) as f64).min(1.0);
            cuts += try_cuts(&format!("seed {seed}, host {index}"), &trace, fresh, density, &mut random);
        }
        seed += 1;
    }
    println!("{cuts} cuts of {} traces with {steps} steps, all identical", 2 * (seed - 500_000));
}
