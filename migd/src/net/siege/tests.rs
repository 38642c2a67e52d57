use sys::netlink::Netlink;
use sys::netns::{self, NetNamespace};
use sys::packet::PacketSocket;

use super::*;

/// So slow that each kind of packet passes once in a test.
const ONCE: Limits = Limits { new: 1 << 50, again: 1 << 50, stray: 1 << 50, burst: 0 };
const ACK: u8 = 0x10;
const SYN_FLAG: u8 = 0x02;

/// A TUN device in a namespace of its own, and a way to put packets into it.
struct Device {
    tun: Tun,
    socket: PacketSocket,
    link: u32,
    namespace: String,
}

impl Drop for Device {
    fn drop(&mut self) {
        // It must not hide why a test failed.
        let _ = netns::remove_named(&self.namespace);
    }
}

impl Device {
    fn new(name: &str) -> Device {
        let name = format!("migd-test-siege-{name}-{}", std::process::id());
        let namespace = NetNamespace::create_named(&name).expect("these tests need root");
        let (tun, socket, link) = namespace
            .run(|| {
                let tun = Tun::create("tun0")?;
                // Else the kernel announces itself, and another processor may be sending when a test is.
                let _ = std::fs::write("/proc/sys/net/ipv6/conf/tun0/disable_ipv6", "1");
                let mut netlink = Netlink::open()?;
                let link = netlink.link("tun0")?.index;
                netlink.set_up(link, None, None)?;
                Ok((tun, PacketSocket::open()?, link))
            })
            .expect("a device can be made");
        Device { tun, socket, link, namespace: name }
    }

    /// Whether the packet comes through.
    fn passes(&self, packet: &[u8]) -> bool {
        self.socket.send(self.link, packet).expect("the device takes packets");
        let mut buffer = [0; 2048];
        // The device has queued the packet, or dropped it, before `send` returned.
        while let Ok(length) = self.tun.receive(&mut buffer) {
            if &buffer[sys::tun::HEADER_LEN..length] == packet {
                return true;
            }
        }
        false
    }
}

fn peer(index: u32, v6: bool) -> SocketAddr {
    let [_, _, high, low] = index.to_be_bytes();
    let address =
        if v6 { format!("fd00::{index:x}").parse().expect("an address") } else { IpAddr::from([10, 1, high, low]) };
    SocketAddr::new(address, 4000)
}

fn own(v6: bool) -> SocketAddr {
    let address = if v6 { "fd00::ffff:1".parse().expect("an address") } else { IpAddr::from([10, 0, 0, 1]) };
    SocketAddr::new(address, 80)
}

fn packet(source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    let mut packet = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet
        }
        _ => panic!("one family"),
    };
    packet.extend(source.port().to_be_bytes());
    packet.extend(destination.port().to_be_bytes());
    packet.extend([0; 8]);
    packet.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    packet
}

fn nobody() -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
    std::iter::empty()
}

#[test]
fn known_flows_pass_and_strangers_are_limited() {
    let device = Device::new("known");
    for v6 in [false, true] {
        let start = Instant::from_millis(1000);
        let mut siege = Siege::new(7, start, &device.tun);
        siege.limits = ONCE;
        assert!(
            (0..50).all(|index| device.passes(&packet(peer(index, v6), own(v6), ACK))),
            "nothing is kept out before"
        );

        siege.begin(start, &device.tun, [(own(v6), peer(1, v6))].into_iter());
        assert!(siege.walls.is_some());
        for _ in 0..10 {
            assert!(device.passes(&packet(peer(1, v6), own(v6), ACK)), "it has a socket");
        }
        let strays = (100..200).filter(|&index| device.passes(&packet(peer(index, v6), own(v6), ACK)));
        assert_eq!(strays.count(), 1, "IPv6: {v6}");
        // The stack has answered one of them.
        assert!(!siege.note_sent(start, &packet(own(v6), peer(150, v6), ACK)));
        assert!(device.passes(&packet(peer(150, v6), own(v6), ACK)));
        // A reset makes no acquaintance.
        assert!(!siege.note_sent(start, &packet(own(v6), peer(160, v6), 0x14)));
        assert!(!device.passes(&packet(peer(160, v6), own(v6), ACK)));

        let new = (300..400).filter(|&index| device.passes(&packet(peer(index, v6), own(v6), SYN_FLAG)));
        assert_eq!(new.count(), 1);
        // That came before; what comes again has a share of its own.
        let again = (310..400).filter(|&index| device.passes(&packet(peer(index, v6), own(v6), SYN_FLAG | 0xc0)));
        assert_eq!(again.count(), 1);
    }
}

#[test]
fn what_is_no_segment_passes() {
    let device = Device::new("others");
    let start = Instant::from_millis(1000);
    let mut siege = Siege::new(9, start, &device.tun);
    siege.limits = ONCE;
    siege.begin(start, &device.tun, nobody());
    for v6 in [false, true] {
        let mut datagram = packet(peer(1, v6), own(v6), ACK);
        datagram[if v6 { 6 } else { 9 }] = 17;
        assert!((0..20).all(|_| device.passes(&datagram)));
    }
    for fragment in [[0x20, 0], [0, 9], [0x20, 9]] {
        let mut piece = packet(peer(1, false), own(false), ACK);
        piece[6..8].copy_from_slice(&fragment);
        assert!((0..20).all(|_| device.passes(&piece)));
    }
    // Options before the TCP header; and one that ends within it.
    let (peer, own) = (peer(1, false), own(false));
    siege.note_sent(start, &packet(own, peer, ACK));
    let mut long = packet(peer, own, ACK);
    long[0] = 0x46;
    long[3] += 4;
    long.splice(20..20, [1, 1, 1, 0]);
    assert!(device.passes(&long));
    assert!(!device.passes(&packet(peer, own, ACK)[..22]));
}

#[test]
fn it_ends_with_the_flood() {
    let device = Device::new("end");
    let mut now = Instant::from_millis(1000);
    let mut siege = Siege::new(11, now, &device.tun);
    siege.limits = ONCE;
    let flow = (own(false), peer(60_000, false));
    siege.begin(now, &device.tun, [flow].into_iter());
    let stray = |index| device.passes(&packet(peer(index, false), own(false), ACK));
    let mut index = 0;
    // As long as something is dropped it stays.
    for _ in 0..4 * TURNS_A_FLOW_MEMORY {
        now = siege.due().expect("it has begun");
        index += 2;
        assert!(index == 2 || !stray(index));
        stray(index + 1);
        siege.turn(now, &device.tun, [flow].into_iter());
        assert!(stray(60_000), "a connection stays known");
    }
    for _ in 0..QUIET_TURNS {
        now = siege.due().expect("not yet");
        siege.turn(now, &device.tun, nobody());
    }
    assert!(siege.due().is_none());
    assert!((0..20).all(|index| stray(1000 + index)));
    // The next flood finds it ready.
    siege.begin(now, &device.tun, nobody());
    assert!(siege.due().is_some());
    assert!((0..20).filter(|&index| stray(2000 + index)).count() <= 1);
    // Who takes over the device begins without.
    let _other = Siege::new(13, now, &device.tun);
    assert!((0..20).all(|index| stray(3000 + index)));
}

#[test]
fn memories_fade() {
    let device = Device::new("fade");
    let mut now = Instant::from_millis(1000);
    let mut siege = Siege::new(15, now, &device.tun);
    siege.limits = Limits { again: 0, ..ONCE };
    siege.begin(now, &device.tun, nobody());
    let syn = |index| device.passes(&packet(peer(index, false), own(false), SYN_FLAG));
    let turn = |siege: &mut Siege, now: &mut Instant| {
        *now = siege.due().expect("it lasts");
        siege.turn(*now, &device.tun, nobody());
    };
    assert!(syn(0));
    assert!(!syn(1));
    assert!(syn(1), "the same again");
    turn(&mut siege, &mut now);
    assert!(syn(1));
    assert!(!syn(2));
    turn(&mut siege, &mut now);
    assert!(syn(2), "one turn later");
    turn(&mut siege, &mut now);
    turn(&mut siege, &mut now);
    assert!(!syn(1), "forgotten");

    siege.note_sent(now, &packet(own(false), peer(5, false), ACK));
    let known = |index| device.passes(&packet(peer(index, false), own(false), ACK));
    known(6);
    for _ in 0..TURNS_A_FLOW_MEMORY {
        assert!(known(5));
        assert!(!syn(7 + u32::try_from(siege.walls.as_ref().unwrap().turns).unwrap()), "so that it lasts");
        turn(&mut siege, &mut now);
    }
    for _ in 0..TURNS_A_FLOW_MEMORY {
        assert!(!syn(100 + u32::try_from(siege.walls.as_ref().unwrap().turns).unwrap()), "so that it lasts");
        turn(&mut siege, &mut now);
    }
    assert!(!known(5), "forgotten");
}

#[test]
fn many_resets_are_a_flood() {
    let device = Device::new("resets");
    let now = Instant::from_millis(1000);
    let mut siege = Siege::new(17, now, &device.tun);
    let reset = packet(own(false), peer(1, false), 0x14);
    assert!((0..RESETS_MAX).all(|_| !siege.note_sent(now, &reset)));
    assert!(siege.note_sent(now, &reset));
    assert!(!siege.note_sent(now + RESET_WINDOW + RESET_WINDOW, &reset), "they were few for so long a time");
    for _ in 0..RESETS_MAX {
        assert!(!siege.note_sent(now + RESET_WINDOW + RESET_WINDOW, &packet(own(false), peer(1, false), ACK)));
    }
}
