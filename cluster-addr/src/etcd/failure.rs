//! What a failed request to a member means.

use std::error::Error as _;
use std::io;

use crate::directory::DirectoryError;

/// What is known of a request that failed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The answer, from whichever member.
    Final(DirectoryError),
    /// It was not carried out; another member may do better.
    NotDone(String),
    /// It may have been carried out.
    Unclear(String),
}

impl Failure {
    pub(super) fn of(error: &etcd_client::Error) -> Self {
        let etcd_client::Error::GRpcStatus(status) = error else {
            return Self::Unclear(error.to_string());
        };
        let message = status.message();
        let text = if message.is_empty() { status.code().to_string() } else { message.to_owned() };
        // The texts are etcd's interface (api/v3rpc/rpctypes/error.go): its own clients tell errors apart by them.
        let says = |known: &[&str]| known.iter().any(|known| message.contains(known));
        if says(&["required revision has been compacted"]) {
            return Self::Final(DirectoryError::Compacted(0));
        }
        // Said before a change is made, and of the one that has used up the space, which has been made (etcd's quotaApplierV3).
        if says(&["database space exceeded"]) {
            return Self::Final(DirectoryError::Unknown(text));
        }
        if says(&["duplicate key given", "too many operations", "request is too large", "key is not provided"]) {
            return Self::Final(DirectoryError::Invalid(text));
        }
        if says(&["etcdserver: no leader", "not capable", "too many requests", "rpc not supported for learner"]) {
            return Self::NotDone(text);
        }
        if never_connected(status) { Self::NotDone(text) } else { Self::Unclear(text) }
    }
}

/// Whether the request can't have been sent because there was no connection to send it over.
fn never_connected(status: &tonic::Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::AddrNotAvailable
            )
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(message: &str) -> Failure {
        Failure::of(&etcd_client::Error::GRpcStatus(tonic::Status::unavailable(message)))
    }

    #[test]
    fn only_what_is_certain_is_taken_for_certain() {
        assert!(matches!(of("etcdserver: no leader"), Failure::NotDone(_)));
        assert!(matches!(of("etcdserver: request timed out"), Failure::Unclear(_)));
        assert!(matches!(of("etcdserver: leader changed"), Failure::Unclear(_)));
        assert!(matches!(of("transport is closing"), Failure::Unclear(_)));
        let full = of("etcdserver: mvcc: database space exceeded");
        assert!(matches!(full, Failure::Final(DirectoryError::Unknown(_))), "{full:?}");
    }
}
