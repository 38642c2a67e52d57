//! `migd pcap`: a job's packets into a file, wherever the job runs.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use super::Target;
use super::arguments::PcapArgs;
use super::foreground::open_patiently;
use crate::api::{CaptureEvent, ClientError, DaemonRequest, JobView};
use crate::net::{ENHANCED_PACKET, packet_block_header};

/// `migd pcap`.
pub async fn record(target: &Target, args: PcapArgs) -> anyhow::Result<ExitCode> {
    let client = target.client()?;
    let PcapArgs { write, snap_length, count, job } = args;
    let number = number()?;
    let request = |job| DaemonRequest::Capture { job, number, snap_length };
    let (job, mut connection) = client.open::<JobView>(&request(job)).await?;
    let mut output = Output::create(&write, count)?;
    eprintln!("migd: recording the packets of job {} on node {}; Ctrl-C ends it", job.name, job.node);
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        let event = tokio::select! {
            event = connection.receive::<CaptureEvent>() => event,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        };
        match event {
            Ok(Some(CaptureEvent::Packets { blocks })) => {
                if output.write(&blocks).with_context(|| format!("can't write {}", write.display()))? {
                    break;
                }
            }
            Ok(Some(CaptureEvent::Moved { node })) => eprintln!("migd: job {} runs on node {node} now", job.name),
            Ok(Some(CaptureEvent::Ended)) => break,
            Ok(Some(CaptureEvent::Failed(error))) => return Err(ClientError::from(error).into()),
            Ok(None) | Err(_) => {
                eprintln!("migd: the daemon went away; waiting for it");
                connection = open_patiently(&client, &request(job.id.clone())).await?;
            }
        }
    }
    eprintln!("migd: {} packets recorded, {} dropped", output.packets, output.dropped);
    Ok(ExitCode::SUCCESS)
}

fn number() -> io::Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The file, with a count of what is in it.
struct Output {
    file: Box<dyn Write>,
    /// Packets written.
    packets: u64,
    /// Packets that the job's node dropped because this side was too slow.
    dropped: u64,
    most: Option<u64>,
}

impl Output {
    fn create(path: &Path, most: Option<u64>) -> anyhow::Result<Output> {
        let file: Box<dyn Write> = if path == Path::new("-") {
            Box::new(io::stdout())
        } else {
            Box::new(File::create(path).with_context(|| format!("can't create {}", path.display()))?)
        };
        Ok(Output { file, packets: 0, dropped: 0, most })
    }

    /// Writes whole blocks; `true` when that is enough.
    fn write(&mut self, blocks: &[u8]) -> io::Result<bool> {
        let mut end = 0;
        while let Some((kind, length)) = packet_block_header(&blocks[end..]) {
            let block = blocks.get(end..end + length).ok_or(io::ErrorKind::InvalidData)?;
            end += length;
            if kind == ENHANCED_PACKET {
                self.packets += 1;
                self.dropped += dropped(block);
            }
            if self.most == Some(self.packets) {
                break;
            }
        }
        match self.file.write_all(&blocks[..end]).and_then(|()| self.file.flush()) {
            // The reader has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(true),
            Err(error) => Err(error),
            Ok(()) => Ok(self.most == Some(self.packets)),
        }
    }
}

/// The number in a packet block's option `epb_dropcount`.
fn dropped(block: &[u8]) -> u64 {
    const OPTION: u16 = 4;
    let word = |at: usize| block.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    let Some(kept) = word(20).and_then(|kept| usize::try_from(kept).ok()) else { return 0 };
    let mut at = 28 + kept.next_multiple_of(4);
    while let Some(header) = word(at).map(u32::to_ne_bytes) {
        let code = u16::from_ne_bytes([header[0], header[1]]);
        let length = usize::from(u16::from_ne_bytes([header[2], header[3]]));
        if code == 0 {
            break;
        }
        if code == OPTION {
            let value = block.get(at + 4..at + 12).and_then(|bytes| bytes.try_into().ok());
            return value.map_or(0, u64::from_ne_bytes);
        }
        at += 4 + length.next_multiple_of(4);
    }
    0
}
