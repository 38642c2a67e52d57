//! `inspect --sockets`, in the manner of `ss -tiem`.

use std::fmt::Write;
use std::net::SocketAddr;
use std::process::ExitCode;

use super::Target;
use super::arguments::InspectArgs;
use super::listing::{print, print_json};
use crate::api::{DaemonRequest, SocketListing};
use crate::net::{SocketDescription, TcpDetail};

/// `migd inspect --sockets`.
pub async fn list(target: &Target, args: InspectArgs) -> anyhow::Result<ExitCode> {
    let listing: SocketListing = target.client()?.ask(&DaemonRequest::Sockets { job: args.job }).await?;
    if args.json {
        print_json(&listing)?;
    } else {
        print(&table(&listing.sockets))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(sockets: &[SocketDescription]) -> String {
    let addresses: Vec<[String; 2]> =
        sockets.iter().map(|socket| [address(socket.local), address(socket.remote)]).collect();
    let width = |column: usize| addresses.iter().map(|row| row[column].len()).max().unwrap_or(0).max(18);
    let (local_width, remote_width) = (width(0), width(1));
    let mut text = format!(
        "{:<5} {:<11} {:>8} {:>8} {:<local_width$} {:<remote_width$} INODE\n",
        "NETID", "STATE", "RECV-Q", "SEND-Q", "LOCAL", "PEER"
    );
    for (socket, [local, remote]) in sockets.iter().zip(&addresses) {
        let inode = socket.inode.map_or_else(|| "-".to_owned(), |inode| inode.to_string());
        let SocketDescription { state, receive_queue, send_queue, .. } = socket;
        let protocol = socket.protocol.name();
        let _ = writeln!(
            text,
            "{protocol:<5} {state:<11} {receive_queue:>8} {send_queue:>8} {local:<local_width$} {remote:<remote_width$} {inode}"
        );
        if let Some(detail) = &socket.tcp {
            let _ = writeln!(text, "    {}", details(detail));
        }
    }
    text
}

fn address(address: Option<SocketAddr>) -> String {
    match address {
        None => "*".to_owned(),
        Some(address) if address.ip().is_unspecified() && address.port() == 0 => "*".to_owned(),
        Some(address) => address.to_string(),
    }
}

/// One line with ss's words; what is zero and says nothing by it is left out, as ss does.
fn details(tcp: &TcpDetail) -> String {
    let mut words = tcp.options.clone();
    let mut word = |text: String| words.push(text);
    if tcp.congestion_state != "open" {
        word(tcp.congestion_state.clone());
    }
    word(format!("rto:{}", tcp.rto_ms));
    if tcp.backoff > 0 {
        word(format!("backoff:{}", tcp.backoff));
    }
    word(format!("rtt:{}/{}", tcp.rtt_ms, tcp.rtt_var_ms));
    word(format!("minrtt:{}", tcp.min_rtt_ms));
    for (name, value) in
        [("mss", tcp.mss), ("pmtu", tcp.pmtu), ("rcvmss", tcp.rcv_mss), ("advmss", tcp.adv_mss), ("cwnd", tcp.cwnd)]
    {
        word(format!("{name}:{value}"));
    }
    if let Some(ssthresh) = tcp.ssthresh {
        word(format!("ssthresh:{ssthresh}"));
    }
    word(format!("send {}", rate(tcp.send_bits_per_second)));
    for (name, value) in [
        ("bytes_sent", tcp.bytes_sent),
        ("bytes_retrans", tcp.bytes_retransmitted),
        ("bytes_acked", tcp.bytes_acked),
        ("bytes_received", tcp.bytes_received),
        ("segs_out", tcp.segs_out.into()),
        ("segs_in", tcp.segs_in.into()),
        ("unacked", tcp.unacked.into()),
        ("sacked", tcp.sacked.into()),
        ("lost", tcp.lost.into()),
        ("dsack_dups", tcp.dsack_dups.into()),
        ("reord_seen", tcp.reord_seen.into()),
        ("rcv_ooopack", tcp.rcv_ooopack.into()),
        ("notsent", tcp.notsent_bytes.into()),
        ("snd_wnd", tcp.snd_wnd.into()),
        ("rcv_wnd", tcp.rcv_wnd.into()),
    ] {
        if value > 0 {
            word(format!("{name}:{value}"));
        }
    }
    if tcp.total_retrans > 0 {
        word(format!("retrans:{}/{}", tcp.retrans, tcp.total_retrans));
    }
    word(format!("lastsnd:{} lastrcv:{} lastack:{}", tcp.last_send_ms, tcp.last_receive_ms, tcp.last_ack_ms));
    words.join(" ")
}

fn rate(bits_per_second: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "Gbps"), (1_000_000, "Mbps"), (1_000, "Kbps")];
    let unit = UNITS.into_iter().find(|(size, _)| bits_per_second >= *size);
    match unit {
        // Shown to a tenth; what a float can't hold of it doesn't show.
        Some((size, name)) => format!("{:.1}{name}", bits_per_second as f64 / size as f64),
        None => format!("{bits_per_second}bps"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_takes_two_lines() {
        let tcp = TcpDetail {
            options: vec!["ts".into(), "wscale:7,7".into()],
            congestion_state: "recovery".into(),
            rto_ms: 204.0,
            rtt_ms: 1.25,
            send_bits_per_second: 92_672_000,
            total_retrans: 3,
            retrans: 1,
            ..TcpDetail::default()
        };
        let socket = SocketDescription {
            state: "ESTAB".into(),
            inode: Some(77),
            tcp: Some(tcp),
            ..serde_json::from_str(
                r#"{"key":1,"inode":1,"state":"","local":"10.77.0.5:6379","remote":"10.99.0.9:50000","receive_queue":0,"send_queue":9,"tcp":null}"#,
            )
            .unwrap()
        };
        let text = table(&[socket]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("tcp   ESTAB              0        9 10.77.0.5:6379"), "{}", lines[1]);
        for part in ["ts wscale:7,7 recovery rto:204 rtt:1.25/0", "send 92.7Mbps", "retrans:1/3"] {
            assert!(lines[2].contains(part), "{part}: {}", lines[2]);
        }
    }
}
