//! Descriptors of real processes, dumped from outside and put into other processes.

mod support;

use std::os::fd::AsFd;
use std::time::Duration;

use checkpoint::descriptors::image::Kind;
use checkpoint::{External, ExternalKey, FdKind};
use support::{Directory, Program, Tree};

#[test]
fn everything_is_the_same_in_another_process() {
    let directory = Directory::new("everything");
    let source = Program::start("everything.py", &["open", directory.path()]);
    let target = Program::start_elsewhere("everything.py", &["stub", directory.path()]);

    let mut frozen = Tree::stop(&[&source]);
    let image = frozen.dump(&NoExternals).expect("everything can move");
    // A dump changes nothing: a second one says the same.
    support::assert_alike(&image, &frozen.dump(&NoExternals).expect("again"));

    let mut stubs = Tree::stop(&[&target]);
    let mut restorer = stubs.restore(image.clone(), &mut |key| panic!("no {key:?} here"));
    // The source holds its locks and its socket's name until it is gone.
    frozen.kill();
    stubs.finish(&mut restorer);
    drop(restorer);

    let again = stubs.dump(&NoExternals).expect("the restored can move");
    support::assert_alike(&image, &again);
    stubs.release();
    target.signal(sys::libc::SIGUSR1);
    assert_eq!(directory.await_file("verdict", Duration::from_secs(20)), "fine");
    assert!(directory.names().iter().all(|name| !name.starts_with(".migd")), "{:?}", directory.names());
}

#[test]
fn an_aborted_dump_and_restore_leave_the_source_as_it_was() {
    let directory = Directory::new("abort");
    let source = Program::start("everything.py", &["open", directory.path()]);
    let target = Program::start_elsewhere("everything.py", &["stub", directory.path()]);
    let mut frozen = Tree::stop(&[&source]);
    let image = frozen.dump(&NoExternals).expect("everything can move");
    let mut stubs = Tree::stop(&[&target]);
    let restorer = stubs.restore(image, &mut |key| panic!("no {key:?} here"));
    drop(restorer);
    stubs.kill();
    frozen.release();
    source.signal(sys::libc::SIGUSR1);
    assert_eq!(directory.await_file("verdict", Duration::from_secs(20)), "fine");
    assert!(directory.names().iter().all(|name| !name.starts_with(".migd")), "{:?}", directory.names());
}

/// Datagrams that wait are received after a move by whom they waited for, with all that the kernel told of them.
#[test]
fn queued_datagrams_move() {
    let directory = Directory::new("datagrams");
    let source = Program::start_elsewhere("datagrams.py", &["open", directory.path()]);
    let target = Program::start_elsewhere("datagrams.py", &["stub", directory.path()]);
    let mut frozen = Tree::stop(&[&source]);
    let image = frozen.dump(&NoExternals).expect("everything can move");
    support::assert_alike(&image, &frozen.dump(&NoExternals).expect("again"));
    let mut stubs = Tree::stop(&[&target]);
    let mut restorer = stubs.restore(image.clone(), &mut |key| panic!("no {key:?} here"));
    stubs.finish(&mut restorer);
    drop(restorer);
    support::assert_alike(&image, &stubs.dump(&NoExternals).expect("the restored can move"));
    // The source goes on as if nothing had been, and so does the copy.
    for (mut tree, program) in [(frozen, &source), (stubs, &target)] {
        tree.release();
        program.signal(sys::libc::SIGUSR1);
        assert_eq!(directory.await_file("verdict", Duration::from_secs(30)), "fine");
        std::fs::remove_file(std::path::Path::new(directory.path()).join("verdict")).expect("it was read");
    }
    let shares = |role| directory.await_file(role, Duration::from_secs(30));
    assert_eq!(shares("shares-open"), shares("shares-stub"));
}

#[test]
fn a_socket_from_outside_moves_once_its_peer_is_gone() {
    let (inner, outer) = sys::fds::sockets::socket_pair(sys::libc::SOCK_STREAM).expect("a pair");
    let source = Program::sleeper_elsewhere(inner);
    let reasons = Tree::without_stopping(&[source.pid()]).stay_reasons(&NoExternals);
    assert!(reasons.iter().any(|reason| reason.what == "fd 0"), "its peer is ours: {reasons:?}");
    sys::fds::write(outer.as_fd(), b"last words").expect("it takes them");
    drop(outer);
    let mut frozen = Tree::stop(&[&source]);
    let image = frozen.dump(&NoExternals).expect("it can move");
    let target = Program::sleeper();
    let mut stubs = Tree::stop(&[&target]);
    drop(stubs.restore(image.clone(), &mut |key| panic!("no {key:?} here")));
    support::assert_alike(&image, &stubs.dump(&NoExternals).expect("the restored can move"));
    assert_eq!(image.sockets[0].queue[0].data.as_slice(), b"last words");
}

/// Holds no descriptor of the job.
struct NoExternals;

impl External for NoExternals {
    fn key(&self, _: FdKind, _: u64) -> Option<ExternalKey> {
        None
    }
}

/// Calls every socket the test's.
struct AllSockets;

impl External for AllSockets {
    fn key(&self, kind: FdKind, inode: u64) -> Option<ExternalKey> {
        (kind == FdKind::Socket).then_some(ExternalKey::Socket(inode))
    }
}

#[test]
fn files_shared_by_processes_stay_shared() {
    let directory = Directory::new("shared");
    let (parent, child) = Program::start_with_child("forks.py", directory.path());
    let (first, second) = (Program::sleeper(), Program::sleeper());
    let mut frozen = Tree::stop_pids(&[parent.pid(), child]);
    let image = frozen.dump(&AllSockets).expect("it can move");
    assert_eq!(image.tables.len(), 2);
    let file = |table: usize, number: i32| {
        image.tables[table].slots.iter().find(|slot| slot.number == number).map(|slot| slot.file)
    };
    assert_eq!(file(0, 30), file(1, 31), "one open file, two numbers");
    let mut stubs = Tree::stop(&[&first, &second]);
    let restorer = stubs
        .restore(image.clone(), &mut |_| Ok(sys::fds::sockets::socket_pair(sys::libc::SOCK_STREAM).expect("a pair").0));
    drop(restorer);
    support::assert_alike(&image, &stubs.dump(&AllSockets).expect("the restored can move"));
}

#[test]
fn what_stays_is_named() {
    let source = Program::start("stays.py", &[]);
    let tree = Tree::without_stopping(&[source.pid()]);
    let reasons = tree.stay_reasons(&NoExternals);
    for (number, words) in [
        (20, "unix socket connected to"),
        (21, "whose reading end is outside the job"),
        (22, "io_uring"),
        (23, "namespace net:["),
        (24, "terminal"),
        (25, "outside the job"),
        (26, "descriptor"),
    ] {
        let what = format!("fd {number}");
        let found = reasons.iter().find(|reason| reason.what == what);
        if number == 26 {
            // Descriptors on their way are seen only when the job stands still.
            assert!(found.is_none(), "{found:?}");
            continue;
        }
        let found = found.unwrap_or_else(|| panic!("nothing about {what}: {reasons:#?}"));
        assert!(found.why.contains(words), "{found}");
    }
}

#[test]
fn ten_thousand_sockets_move() {
    let source = Program::start("many.py", &["10000"]);
    let target = Program::sleeper();
    let mut frozen = Tree::stop(&[&source]);
    let begin = std::time::Instant::now();
    let image = frozen.dump(&AllSockets).expect("it can move");
    let dumped = begin.elapsed();
    assert!(image.files.iter().filter(|file| matches!(file.kind, Kind::External(_))).count() >= 10_000);
    let mut stubs = Tree::stop(&[&target]);
    let begin = std::time::Instant::now();
    let restorer = stubs.restore(image.clone(), &mut |_| sys::fds::events::eventfd(0, false));
    let restored = begin.elapsed();
    drop(restorer);
    // `--nocapture` shows the figures.
    println!("10,000 sockets and an epoll of them: dump {dumped:?}, restore {restored:?}");
    let again = stubs.dump(&AllSockets).expect("the restored can move");
    assert_eq!(again.tables[0].slots.len(), image.tables[0].slots.len());
}
