//! The job's UDP sockets, which are the kernel's: what `ss -u` shows, from `/proc/PID/net/udp` and `udp6`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::describe::{Protocol, SocketDescription};

/// Numbers that the kernel shows for the two states a UDP socket has (`TCP_ESTABLISHED`, `TCP_CLOSE`).
const CONNECTED: &str = "01";

/// The UDP sockets of the network namespace of a process, by local address. Nothing when the process is gone.
pub fn datagram_sockets(pid: i32) -> Vec<SocketDescription> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
    let mut sockets: Vec<_> = ["udp", "udp6"]
        .into_iter()
        .flat_map(|file| read(file).lines().filter_map(socket).collect::<Vec<_>>())
        .collect();
    sockets.sort_by_key(|socket| (socket.local, socket.remote));
    sockets
}

/// One line of the table; the heading is none.
fn socket(line: &str) -> Option<SocketDescription> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = address(words.next()?)?;
    let remote = address(words.next()?)?;
    let connected = words.next()? == CONNECTED;
    let (send, receive) = words.next()?.split_once(':')?;
    let queue = |hex: &str| usize::from_str_radix(hex, 16).ok();
    // Timer, retransmissions, user, time-out.
    let inode = words.nth(4)?.parse().ok()?;
    Some(SocketDescription {
        protocol: Protocol::Udp,
        inode: Some(inode),
        state: if connected { "ESTAB" } else { "UNCONN" }.to_owned(),
        receive_queue: queue(receive)?,
        send_queue: queue(send)?,
        ..SocketDescription::closed(Some(local), connected.then_some(remote))
    })
}

/// `HEX:PORT`, the address as 32-bit words in the byte order of the machine.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernels_table_are_read() {
        let heading = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops";
        assert_eq!(socket(heading), None);
        let unconnected = "  411: 00000000:0035 00000000:0000 07 00000000:00000300 00:00000000 00000000     0        0 9531 2 0000000000000000 0";
        let read = socket(unconnected).expect("a socket");
        assert_eq!((read.state.as_str(), read.local, read.remote), ("UNCONN", "0.0.0.0:53".parse().ok(), None));
        assert_eq!((read.receive_queue, read.send_queue, read.inode), (768, 0, Some(9531)));
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn addresses_are_in_words_of_the_machines_order() {
        assert_eq!(address("05004D0A:18EB"), "10.77.0.5:6379".parse().ok());
        assert_eq!(address("000077FD000000000000000005000000:0035"), "[fd77::5]:53".parse().ok());
        for odd in ["", "05004D0A", "05004D:1", "05004D0A:1FFFF", "05004DxA:1"] {
            assert_eq!(address(odd), None, "{odd:?}");
        }
    }
}
