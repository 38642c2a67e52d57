//! The scripts.

use super::case::{Case, P, p, sack, timestamps};

/// A script and its name.
pub type Script = (&'static str, Box<dyn Fn(&mut Case<'_>)>);

const MSS: [u8; 4] = [2, 4, 5, 0xb4];
const SACK_OK: [u8; 4] = [1, 1, 4, 2];
const SCALE: [u8; 4] = [1, 3, 3, 7];

/// What every sensible SYN offers.
fn usual() -> Vec<u8> {
    [MSS.as_slice(), &SACK_OK, &SCALE].concat()
}

fn with_timestamps() -> Vec<u8> {
    [usual(), timestamps(1000, 0)].concat()
}

/// A listener.
fn listen(case: &mut Case<'_>) {
    let (family, port) = (case.rig.family_name(), case.server_port);
    let name = format!("l{port}");
    let any = if family == "4" { "0.0.0.0" } else { "::" };
    for command in [format!("open {name} {family}"), format!("bind {name} {any} {port}"), format!("listen {name} 16")] {
        assert_eq!(case.rig.call(&command), "ok", "{command}");
    }
}

/// The handshake up to the SYN-ACK.
fn half_open(case: &mut Case<'_>, options: &[u8]) {
    listen(case);
    case.inject("SYN", p("S", 0, 0).options(options));
}

/// A connection that the program has accepted as `c`.
fn established(case: &mut Case<'_>) {
    half_open(case, &usual());
    case.inject("ACK", p("A", 1, 1));
    accept(case);
}

/// The same with timestamps.
fn stamped(case: &mut Case<'_>) {
    half_open(case, &with_timestamps());
    case.with_timestamps();
    case.inject("ACK", p("A", 1, 1));
    accept(case);
}

fn accept(case: &mut Case<'_>) {
    let port = case.server_port;
    let answer = case.rig.call(&format!("accept l{port} c"));
    case.note(&format!("accept: {answer}"));
}

/// The program begins to connect, as `c`.
fn connecting(case: &mut Case<'_>) {
    let (family, client, port) = (case.rig.family_name(), case.rig.client, case.client_port);
    assert_eq!(case.rig.call(&format!("open c {family}")), "ok");
    assert_eq!(case.rig.call(&format!("connect c {client} {port}")), "ok");
    case.expect_any_port();
    case.wait("connect", 1);
}

/// The program has closed first, and both FINs are acknowledged.
fn time_wait(case: &mut Case<'_>) {
    stamped(case);
    case.call("close c");
    case.inject("ACK of the FIN", p("A", 1, 2));
    case.inject("FIN", p("FA", 1, 2));
}

/// Every case.
pub fn all() -> Vec<Script> {
    let mut all: Vec<Script> = Vec::new();
    let mut add = |name: &'static str, script: Box<dyn Fn(&mut Case<'_>)>| all.push((name, script));

    // ---- a listener hears its first packet
    let alone: [(&'static str, P); 30] = [
        ("SYN without options", p("S", 0, 0)),
        ("SYN with MSS", p("S", 0, 0).options(&MSS)),
        ("SYN with scale alone", p("S", 0, 0).options(&SCALE)),
        ("SYN with SACK alone", p("S", 0, 0).options(&SACK_OK)),
        ("SYN with timestamps alone", p("S", 0, 0).options(&timestamps(1000, 0))),
        ("SYN with everything", p("S", 0, 0).options(&with_timestamps())),
        ("SYN asking for ECN", p("SEC", 0, 0).options(&usual())),
        ("SYN asking for ECN, marked", p("SEC", 0, 0).options(&usual()).marked(3)),
        ("SYN with ECE only", p("SE", 0, 0).options(&usual())),
        ("SYN FIN", p("SF", 0, 0).options(&usual())),
        ("SYN RST", p("SR", 0, 0).options(&usual())),
        ("SYN ACK", p("SA", 0, 1).options(&usual())),
        ("SYN URG", p("SU", 0, 0).options(&usual()).urgent(1)),
        ("SYN PSH", p("SP", 0, 0).options(&usual())),
        ("SYN with data", p("S", 0, 0).options(&usual()).data("early")),
        ("SYN in fragments", p("S", 0, 0).options(&with_timestamps()).data("a long enough payload").cut_at(24)),
        ("SYN with a bad checksum", p("S", 0, 0).options(&usual()).bad_checksum()),
        ("SYN with a short data offset", p("S", 0, 0).data_offset(4)),
        ("SYN with a data offset beyond the end", p("S", 0, 0).data_offset(8)),
        ("SYN from port 0", p("S", 0, 0).sent_from(0)),
        ("no flags", p("", 0, 0)),
        ("FIN", p("F", 0, 0)),
        ("PSH URG FIN", p("FPU", 0, 0).urgent(1)),
        ("ACK", p("A", 0, 1)),
        ("FIN ACK", p("FA", 0, 1)),
        ("ACK with data", p("A", 0, 1).data("hello")),
        ("data without ACK", p("P", 0, 0).data("hello")),
        ("RST", p("R", 0, 0)),
        ("RST ACK", p("RA", 0, 1)),
        ("all flags", p("FSRPAUEC", 0, 1)),
    ];
    for (name, segment) in alone {
        let to_listener = segment.clone();
        add(
            name,
            Box::new(move |case| {
                listen(case);
                case.inject("to a listener", to_listener.clone());
            }),
        );
        add(name, Box::new(move |case| case.inject("to a closed port", segment.clone())));
    }
    let odd: [(&'static str, &'static [u8]); 17] = [
        ("option of unknown kind", &[254, 4, 1, 2, 2, 4, 5, 0xb4]),
        ("option of length 0", &[254, 0, 1, 2, 2, 4, 5, 0xb4]),
        ("option of length 1", &[254, 1, 2, 4, 5, 0xb4]),
        ("option beyond the end", &[2, 4, 5, 0xb4, 254, 9, 0, 0]),
        ("MSS of length 3", &[2, 3, 5, 1, 3, 3, 7, 0]),
        ("MSS of 0", &[2, 4, 0, 0]),
        ("MSS of 1", &[2, 4, 0, 1]),
        ("MSS of 65535", &[2, 4, 255, 255]),
        ("MSS twice", &[2, 4, 5, 0xb4, 2, 4, 2, 0]),
        ("scale of 15", &[2, 4, 5, 0xb4, 3, 3, 15, 0]),
        ("scale of length 4", &[3, 4, 7, 0, 2, 4, 5, 0xb4]),
        ("SACK permitted of length 3", &[4, 3, 0, 0, 2, 4, 5, 0xb4]),
        ("timestamps of length 9", &[8, 9, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ("end of options before others", &[0, 2, 4, 5, 0xb4, 4, 2, 0]),
        ("padding only", &[1, 1, 1, 1]),
        ("SACK blocks on a SYN", &[5, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1]),
        ("fast open asked for", &[2, 4, 5, 0xb4, 34, 2, 1, 1]),
    ];
    for (name, options) in odd {
        add(
            name,
            Box::new(move |case| {
                half_open(case, options);
                case.inject("ACK with data", p("PA", 1, 1).data("hello"));
                accept(case);
                case.call("recv c");
                case.call("pour c 3000");
            }),
        );
    }

    // ---- a half-open connection
    let half: [(&'static str, P); 16] = [
        ("SYN again", p("S", 0, 0).options(&usual())),
        ("SYN with another number", p("S", 5000, 0).options(&usual())),
        ("SYN ACK", p("SA", 0, 1).options(&usual())),
        ("SYN ACK in the window", p("SA", 1, 1).options(&usual())),
        ("RST", p("R", 1, 0)),
        ("RST in the window", p("R", 100, 0)),
        ("RST outside the window", p("R", -100, 0)),
        ("RST ACK with a wrong ACK", p("RA", 1, 77)),
        ("ACK of something else", p("A", 1, 77)),
        ("ACK outside the window", p("A", 1_000_000, 1)),
        ("FIN without ACK", p("F", 1, 0)),
        ("no flags", p("", 1, 0)),
        ("data without ACK", p("P", 1, 0).data("hello")),
        ("ACK with data", p("PA", 1, 1).data("hello")),
        ("FIN ACK", p("FA", 1, 1)),
        ("ACK with data out of order", p("PA", 11, 1).data("world")),
    ];
    for (name, segment) in half {
        add(
            name,
            Box::new(move |case| {
                half_open(case, &usual());
                case.inject("in SYN-RECEIVED", segment.clone());
                case.inject("ACK after it", p("A", 1, 1));
            }),
        );
    }
    add(
        "old timestamp in SYN-RECEIVED",
        Box::new(|case| {
            half_open(case, &with_timestamps());
            case.with_timestamps();
            case.inject("ACK, too old", p("A", 1, 1).old_by(500));
            case.inject("ACK", p("PA", 1, 1).data("hello"));
        }),
    );

    // ---- an established connection
    let synchronized: [(&'static str, P); 49] = [
        ("data", p("PA", 1, 1).data("hello")),
        ("data with a FIN", p("FPA", 1, 1).data("hello")),
        ("data ahead", p("PA", 101, 1).data("hello")),
        ("data seen before", p("PA", -9, 1).data("0123456789")),
        ("data partly seen before", p("PA", -4, 1).data("0123456789")),
        ("data far before the window", p("PA", -100_000, 1).data("hello")),
        ("data beyond the window", p("PA", 10_000_000, 1).data("hello")),
        ("data without ACK", p("P", 1, 0).data("hello")),
        ("data with a bad checksum", p("PA", 1, 1).data("hello").bad_checksum()),
        ("data with ECE", p("PAE", 1, 1).data("hello")),
        ("data with CWR", p("PAC", 1, 1).data("hello")),
        ("marked data", p("PA", 1, 1).data("hello").marked(3)),
        ("data with an unknown option", p("PA", 1, 1).data("hello").options(&[254, 4, 1, 2])),
        ("data with a broken option", p("PA", 1, 1).data("hello").options(&[254, 0, 1, 2])),
        ("data with an option beyond the end", p("PA", 1, 1).data("hello").options(&[254, 99, 1, 2])),
        ("data with an MSS option", p("PA", 1, 1).data("hello").options(&MSS)),
        ("data with unagreed timestamps", p("PA", 1, 1).data("hello").options(&timestamps(5, 6))),
        ("data with a short data offset", p("PA", 1, 1).data("hello").data_offset(4)),
        ("data in fragments", p("PA", 1, 1).data("hello, this is long enough to be cut").cut_at(24)),
        ("urgent data", p("PAU", 1, 1).data("hello").urgent(5)),
        ("urgent data to come", p("AU", 1, 1).urgent(9)),
        ("an ACK of nothing new", p("A", 1, 1)),
        ("an ACK of the future", p("A", 1, 1000)),
        ("data that acknowledges the future", p("PA", 1, 1000).data("hello")),
        ("an ACK just before", p("A", 1, 0)),
        ("an ACK of long ago", p("A", 1, -100_000)),
        ("data that acknowledges long ago", p("PA", 1, -2_000_000).data("hello")),
        ("an ACK from before the window", p("A", -5, 1)),
        ("an ACK from far before the window", p("A", -100_000, 1)),
        ("an ACK from beyond the window", p("A", 10_000_000, 1)),
        ("a keepalive", p("A", 0, 1)),
        ("a keepalive with a byte", p("A", 0, 1).data("x")),
        ("no flags", p("", 1, 0)),
        ("FIN", p("FA", 1, 1)),
        ("FIN without ACK", p("F", 1, 0)),
        ("FIN ahead", p("FA", 50, 1)),
        ("FIN before the window", p("FA", -50, 1)),
        ("FIN beyond the window", p("FA", 10_000_000, 1)),
        ("RST", p("R", 1, 0)),
        ("RST ACK", p("RA", 1, 1)),
        ("RST in the window", p("R", 100, 0)),
        ("RST before the window", p("R", -100, 0)),
        ("RST just before the window", p("R", 0, 0)),
        ("RST beyond the window", p("R", 10_000_000, 0)),
        ("SYN in the window", p("S", 100, 0).options(&usual())),
        ("SYN again", p("S", 0, 0).options(&usual())),
        ("SYN outside the window", p("S", -100_000, 0).options(&usual())),
        ("SYN ACK", p("SA", 0, 1).options(&usual())),
        ("all flags", p("FSRPAUEC", 1, 1).data("hello")),
    ];
    for (name, segment) in synchronized {
        let plain = segment.clone();
        add(
            name,
            Box::new(move |case| {
                established(case);
                case.inject("in ESTABLISHED", plain.clone());
                case.call("send c reply");
                case.inject_data("data after it", p("PA", 1, 6).data("01234"));
            }),
        );
        add(
            name,
            Box::new(move |case| {
                stamped(case);
                case.inject("in ESTABLISHED with timestamps", segment.clone());
                case.call("send c reply");
                case.inject_data("data after it", p("PA", 1, 6).data("01234"));
            }),
        );
    }
    let old: [(&'static str, P); 7] = [
        ("old data", p("PA", 1, 1).data("hello").old_by(500)),
        ("an old ACK", p("A", 1, 1).old_by(500)),
        ("an old ACK from before the window", p("A", 0, 1).old_by(500)),
        ("an old FIN", p("FA", 1, 1).old_by(500)),
        ("an old RST", p("R", 1, 1).old_by(500)),
        ("an old SYN", p("S", 1, 1).old_by(500)),
        ("data without a timestamp", p("PA", 1, 1).data("hello").without_timestamp()),
    ];
    for (name, segment) in old {
        add(
            name,
            Box::new(move |case| {
                stamped(case);
                case.inject("in ESTABLISHED", segment.clone());
                case.call("send c reply");
                case.inject_data("data after it", p("PA", 1, 6).data("01234"));
            }),
        );
    }
    add(
        "reassembly",
        Box::new(|case| {
            stamped(case);
            case.inject("third", p("PA", 21, 1).data("cccccccccc"));
            case.inject("fifth", p("PA", 41, 1).data("eeeeeeeeee"));
            case.inject("third again", p("PA", 21, 1).data("cccccccccc"));
            case.inject("FIN, sixth", p("FA", 51, 1));
            case.inject("first", p("PA", 1, 1).data("aaaaaaaaaa"));
            case.inject("half of the second and the third", p("PA", 16, 1).data("bbbbbccccc"));
            case.inject("second and fourth", p("PA", 11, 1).data("bbbbbbbbbbccccccccccdddddddddd"));
            case.call("recv c");
            case.call("recv c");
            case.inject("FIN again", p("FA", 51, 1));
        }),
    );
    add(
        "acknowledgments of what is sent",
        Box::new(|case| {
            stamped(case);
            case.call("send c 0123456789");
            case.inject("half of it", p("A", 1, 6));
            case.inject("more than was sent", p("A", 1, 12));
            case.inject("all of it", p("A", 1, 11));
            case.call("send c more");
            let blocks = sack(case, &[(100, 200)]);
            case.inject("SACK of what wasn't sent", p("A", 1, 11).options(&blocks));
            let blocks = sack(case, &[(13, 11)]);
            case.inject("SACK turned around", p("A", 1, 11).options(&blocks));
            case.inject("all", p("A", 1, 15));
        }),
    );
    add(
        "a shut window",
        Box::new(|case| {
            stamped(case);
            case.inject("shut", p("A", 1, 1).window(0));
            case.call("send c hello");
            case.wait("the probe", 1);
            case.inject("still shut", p("A", 1, 1).window(0));
            case.inject("open", p("A", 1, 1));
        }),
    );
    add(
        "a window shut with something in flight",
        Box::new(|case| {
            stamped(case);
            case.call("send c hello");
            case.inject("ACK that shuts", p("A", 1, 6).window(0));
            case.call("send c world");
            case.inject("opens a little", p("A", 1, 6).window(1));
        }),
    );
    add(
        "a small window",
        Box::new(|case| {
            established(case);
            // The shift that was offered is 7: the least window but none is 128 bytes.
            case.inject("128 bytes", p("A", 1, 1).window(1));
            case.call("pour c 1000");
            case.inject("ACK", p("A", 1, 129).window(1));
        }),
    );

    // ---- keepalive
    add(
        "keepalive",
        Box::new(|case| {
            stamped(case);
            // TCP_KEEPIDLE, TCP_KEEPINTVL, SO_KEEPALIVE
            for (level, name) in [(6, 4), (6, 5), (1, 9)] {
                assert_eq!(case.rig.call(&format!("set c {level} {name} 1")), "ok");
            }
            case.wait("the probe", 1);
            case.inject("RST", p("R", 1, 1));
            case.call("recv c");
        }),
    );

    // ---- the end
    add(
        "the peer closes first",
        Box::new(|case| {
            stamped(case);
            case.inject("data and FIN", p("FPA", 1, 1).data("bye"));
            case.call("recv c");
            case.call("recv c");
            case.inject("data beyond the FIN", p("PA", 5, 1).data("more"));
            case.call("send c still");
            case.inject("ACK", p("A", 5, 6));
            case.call("close c");
            case.inject("ACK of the FIN", p("A", 5, 7));
            case.inject("ACK to nobody", p("A", 5, 7));
        }),
    );
    add(
        "both close at once",
        Box::new(|case| {
            stamped(case);
            case.call("shutdown c");
            case.inject("FIN that doesn't know", p("FA", 1, 1));
            case.inject("ACK of the FIN", p("A", 2, 2));
            case.inject("FIN again", p("FA", 1, 2));
            case.call("recv c");
        }),
    );
    add(
        "half closed",
        Box::new(|case| {
            stamped(case);
            case.call("shutdown c");
            case.inject("ACK of the FIN", p("A", 1, 2));
            case.inject("data", p("PA", 1, 2).data("hello"));
            case.call("recv c");
            case.inject("ACK beyond the FIN", p("A", 6, 3));
            case.inject("FIN", p("FA", 6, 2));
            case.call("recv c");
        }),
    );
    add(
        "data after a close",
        Box::new(|case| {
            stamped(case);
            case.call("close c");
            case.inject("data", p("PA", 1, 2).data("hello"));
            case.inject("ACK", p("A", 6, 2));
        }),
    );
    add(
        "data after a close, FIN not acknowledged",
        Box::new(|case| {
            stamped(case);
            case.call("close c");
            case.inject("data", p("PA", 1, 1).data("hello"));
            case.inject("ACK", p("A", 6, 2));
        }),
    );
    add(
        "closed with bytes unread",
        Box::new(|case| {
            stamped(case);
            case.inject("data", p("PA", 1, 1).data("hello"));
            case.call("close c");
            case.inject("ACK", p("A", 6, 1));
        }),
    );
    add(
        "closed without lingering",
        Box::new(|case| {
            stamped(case);
            case.call("set c 1 linger 0");
            case.call("close c");
            case.inject("data", p("PA", 1, 1).data("hello"));
        }),
    );
    add(
        "RST while half closed",
        Box::new(|case| {
            stamped(case);
            case.call("shutdown c");
            case.inject("ACK of the FIN", p("A", 1, 2));
            case.inject("RST", p("R", 1, 2));
            case.call("recv c");
        }),
    );
    add(
        "RST after the peer's FIN",
        Box::new(|case| {
            stamped(case);
            case.inject("FIN", p("FA", 1, 1));
            case.inject("RST", p("R", 2, 1));
            case.call("send c lost");
        }),
    );
    let in_time_wait: [(&'static str, P); 11] = [
        ("FIN again", p("FA", 1, 2)),
        ("the last ACK again", p("A", 2, 2)),
        ("data", p("PA", 2, 2).data("hello")),
        ("RST", p("R", 2, 2)),
        ("SYN beyond", p("S", 1000, 0).options(&usual())),
        ("SYN before", p("S", -1000, 0).options(&usual())),
        ("SYN before, with an old timestamp", p("S", -1000, 0).old_by(500)),
        ("SYN beyond, without a timestamp", p("S", 1000, 0).options(&usual()).without_timestamp()),
        ("SYN before, without a timestamp", p("S", -1000, 0).options(&usual()).without_timestamp()),
        ("an ACK outside the window", p("A", 10_000_000, 2)),
        ("SYN ACK", p("SA", 1000, 2).options(&usual())),
    ];
    for (name, segment) in in_time_wait {
        add(
            name,
            Box::new(move |case| {
                time_wait(case);
                case.inject("in TIME-WAIT", segment.clone());
            }),
        );
    }

    // ---- this side connects
    let answers: [(&'static str, P); 17] = [
        ("SYN ACK", p("SA", 0, 1).options(&usual())),
        ("SYN ACK without options", p("SA", 0, 1)),
        ("SYN ACK with data", p("SA", 0, 1).options(&usual()).data("hello")),
        ("SYN ACK with FIN", p("SFA", 0, 1).options(&usual())),
        ("SYN ACK with ECE", p("SAE", 0, 1).options(&usual())),
        ("SYN ACK of another number", p("SA", 0, 77).options(&usual())),
        ("SYN ACK of the ISN itself", p("SA", 0, 0).options(&usual())),
        ("SYN", p("S", 0, 0).options(&usual())),
        ("ACK", p("A", 0, 1)),
        ("ACK of another number", p("A", 0, 77)),
        ("RST ACK", p("RA", 0, 1)),
        ("RST ACK of another number", p("RA", 0, 77)),
        ("RST without ACK", p("R", 0, 0)),
        ("FIN ACK", p("FA", 0, 1)),
        ("data", p("PA", 1, 1).data("hello")),
        ("no flags", p("", 0, 0)),
        ("SYN ACK with a bad checksum", p("SA", 0, 1).options(&usual()).bad_checksum()),
    ];
    for (name, segment) in answers {
        add(
            name,
            Box::new(move |case| {
                connecting(case);
                case.inject("in SYN-SENT", segment.clone());
                case.inject_data("data after it", p("PA", 1, 1).data("world"));
                case.call("close c");
            }),
        );
    }
    add(
        "both open at once",
        Box::new(|case| {
            connecting(case);
            case.inject("SYN", p("S", 0, 0).options(&usual()));
            case.inject("SYN ACK", p("SA", 0, 1).options(&usual()));
            case.call("connected c");
            case.inject("data", p("PA", 1, 1).data("hello"));
            case.call("recv c");
        }),
    );
    add(
        "refused",
        Box::new(|case| {
            connecting(case);
            case.inject("RST ACK", p("RA", 0, 1));
            case.call("connected c");
        }),
    );

    // ---- ICMP errors: port unreachable, host unreachable, prohibited, too big
    // Name, type and code over IPv4, over IPv6, and the word behind the checksum.
    type Failure = (&'static str, (u8, u8), (u8, u8), u32);
    let failures: [Failure; 4] = [
        ("port unreachable", (3, 3), (1, 4), 0),
        ("host unreachable", (3, 1), (1, 3), 0),
        ("prohibited", (3, 13), (1, 1), 0),
        ("protocol unreachable", (3, 2), (4, 1), 0),
    ];
    for (name, v4, v6, word) in failures {
        for (state, shift) in [("about a SYN", 0), ("about another SYN", 77)] {
            add(
                name,
                Box::new(move |case| {
                    connecting(case);
                    case.icmp(state, v4, v6, word, shift);
                    // The error that the program sees is another test's matter; here it only goes on or doesn't.
                    case.inject("SYN ACK after it", p("SA", 0, 1).options(&usual()));
                    case.call("close c");
                }),
            );
        }
        add(
            name,
            Box::new(move |case| {
                stamped(case);
                case.call("send c hello");
                case.icmp("about data", v4, v6, word, 0);
                case.inject_data("data after it", p("PA", 1, 6).data("world"));
                case.call("recv c");
            }),
        );
    }
    for (name, mtu, shift) in
        [("too big", 1300, 0), ("too big, absurdly", 1280, 0), ("too big, forged", 1300, 1_000_000)]
    {
        add(
            name,
            Box::new(move |case| {
                stamped(case);
                case.call("pour c 1400");
                // IPv4 tells the MTU in the lower half of the word, as IPv6 does.
                case.icmp("about data", (3, 4), (2, 0), mtu, shift);
                case.inject("ACK", p("A", 1, 1401));
                case.call("pour c 1400");
            }),
        );
    }
    all
}
