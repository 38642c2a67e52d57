//! Where an etcd is, and which of its keys are the cluster's.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::directory::DirectoryError;

/// What every key of the cluster begins with, unless another is given.
const KEYS: &str = "migd";
/// What places of this kind begin with.
const SCHEME: &str = "etcd:";

/// `etcd:http://HOST:PORT[,http://HOST:PORT...][/KEYS]`: the members' client endpoints, and what the cluster's keys begin
/// with, so that several clusters, or other users, can share an etcd.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    endpoints: Vec<String>,
    keys: String,
}

impl Place {
    /// The members' endpoints, at least one.
    #[must_use]
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    pub(super) fn key(&self, key: &str) -> Vec<u8> {
        format!("{}/{key}", self.keys).into_bytes()
    }

    pub(super) fn strip(&self, key: &[u8]) -> Result<String, DirectoryError> {
        let foreign = || DirectoryError::Storage(format!("{} is no key of the cluster", String::from_utf8_lossy(key)));
        let rest =
            key.strip_prefix(self.keys.as_bytes()).and_then(|rest| rest.strip_prefix(b"/")).ok_or_else(foreign)?;
        String::from_utf8(rest.to_vec()).map_err(|_| foreign())
    }
}

/// The first key after all that begin with a prefix.
pub(super) fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // All there is.
    vec![0]
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.endpoints.join(","))?;
        if self.keys == KEYS { Ok(()) } else { write!(f, "/{}", self.keys) }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            Err(format!("{text:?} is no directory: {why}; it is written etcd:http://HOST:PORT,http://HOST:PORT[/KEYS]"))
        };
        let Some(rest) = text.strip_prefix(SCHEME) else { return wrong("it does not begin with etcd:") };
        let mut endpoints: Vec<String> = rest.split(',').map(str::to_owned).collect();
        let mut keys = KEYS.to_owned();
        if let Some(last) = endpoints.last_mut()
            && let Some(host) = last.strip_prefix("http://")
            && let Some((host, path)) = host.split_once('/')
        {
            let (endpoint, path) = (format!("http://{host}"), path.trim_matches('/').to_owned());
            if !path.is_empty() {
                keys = path;
            }
            *last = endpoint;
        }
        for endpoint in &endpoints {
            if endpoint.starts_with("https://") {
                return wrong("https is not supported");
            }
            let Some(authority) = endpoint.strip_prefix("http://") else {
                return wrong("an endpoint begins with http://");
            };
            let port = authority
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0));
            if !port || authority.contains('/') {
                return wrong("an endpoint is a host and a port");
            }
        }
        Ok(Self { endpoints, keys })
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        for text in ["etcd:http://a:2379", "etcd:http://10.0.0.1:1,http://[fd99::1]:2/some/keys"] {
            assert_eq!(text.parse::<Place>().expect("a place").to_string(), text);
        }
        let place: Place = "etcd:http://a:1,http://b:2/x/".parse().expect("a place");
        assert_eq!(place.endpoints(), ["http://a:1", "http://b:2"]);
        assert_eq!(place.key("job/1"), b"x/job/1");
        assert_eq!(place.strip(b"x/job/1"), Ok("job/1".into()));
        assert!(place.strip(b"xy/job/1").is_err());
        for wrong in [
            "http://a:1",
            "etcd:",
            "etcd:a:1",
            "etcd:https://a:1",
            "etcd:http://a",
            "etcd:http://a:0",
            "etcd:http://a/x,http://b:1",
        ] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_prefix_ends_where_the_next_begins() {
        assert_eq!(end_of_prefix(b"a/"), b"a0");
        assert_eq!(end_of_prefix(&[1, 255]), [2]);
        assert_eq!(end_of_prefix(&[255]), [0]);
    }
}
