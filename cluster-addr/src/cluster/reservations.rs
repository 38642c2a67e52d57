//! Addresses kept under a name, so that a service comes back at the same ones.
//!
//! A reservation's addresses go from one job of it to the next without resting: it is the same service that returns, as a
//! machine that is rebooted keeps its address, and the next job's stack draws its sequence numbers from a fresh secret
//! (RFC 6528). They rest once the reservation is given up.

use std::net::IpAddr;

use super::{Cluster, ClusterError, RACES_MAX, check_name, jobs::TRIES};
use crate::{
    allocator::Family,
    directory::{DirectoryError, Expect, Outcome, Transaction},
    records::{AddressRecord, ReservationRecord, address_key, decode, encode, reservation_key},
};

impl Cluster {
    /// Reserves one address of each family under a name: those wanted, and others of this node's blocks.
    ///
    /// # Errors
    /// [`ClusterError::ReservationTaken`], [`ClusterError::AddressUnavailable`], [`ClusterError::Exhausted`],
    /// [`ClusterError::BadName`], [`ClusterError::Directory`], [`ClusterError::Contended`].
    pub async fn reserve(&self, name: &str, wanted: &[IpAddr]) -> Result<ReservationRecord, ClusterError> {
        check_name(name)?;
        if name.parse::<IpAddr>().is_ok() {
            return Err(ClusterError::BadName(name.to_owned()));
        }
        for family in Family::BOTH {
            let mut same = wanted.iter().filter(|address| Family::of(**address) == family);
            if let (Some(_), Some(second)) = (same.next(), same.next()) {
                let why = "a job has one address of each family; give one".to_owned();
                return Err(ClusterError::AddressUnavailable { address: *second, why });
            }
        }
        let families: Vec<_> = self.record().families().collect();
        for _ in 0..RACES_MAX {
            let mut claims = Vec::new();
            let claimed = async {
                for address in wanted {
                    claims.push(self.claim_address(*address).await?);
                }
                for family in &families {
                    if !wanted.iter().any(|address| Family::of(*address) == *family) {
                        claims.push(self.claim_any(*family).await?);
                    }
                }
                Ok(())
            };
            if let Err(error) = claimed.await {
                self.put_back(&claims, None);
                return Err(error);
            }
            let addresses = claims.iter().map(|claim| claim.address).collect();
            let record = ReservationRecord { name: name.to_owned(), addresses, generation: 0 };
            let key = reservation_key(name);
            let reserve = Transaction::default().expect(&key, Expect::Absent).put(&key, encode(&record));
            let reserved = encode(&AddressRecord::Reserved { name: name.to_owned() });
            let reserve = self.with_claims(reserve, &claims, &reserved);
            match self.transact_settled(&reserve, &key, &encode(&record)).await {
                Ok(Outcome::Done(revision)) => {
                    self.confirm(&claims, revision);
                    return Ok(record);
                }
                Ok(Outcome::Conflict { key: lost, found }) => {
                    self.lost_race(&claims, &lost, found.as_ref()).await?;
                    if lost == key {
                        return Err(ClusterError::ReservationTaken(name.to_owned()));
                    }
                }
                Err(error) => {
                    // If it was made after all, the addresses' records tell whoever tries to take them.
                    self.put_back(&claims, None);
                    return Err(error.into());
                }
            }
        }
        Err(ClusterError::Contended)
    }

    /// Gives up a reservation. A job that uses its addresses keeps them to its end.
    ///
    /// # Errors
    /// [`ClusterError::NoReservation`], [`ClusterError::Directory`], [`ClusterError::Contended`].
    pub async fn release_reservation(&self, name: &str) -> Result<ReservationRecord, ClusterError> {
        let key = reservation_key(name);
        // As it was when the directory did not say whether it was given up, and how often that was.
        let mut doubt: Option<ReservationRecord> = None;
        let mut unanswered = 0;
        for _ in 0..RACES_MAX {
            let Some(found) = self.directory.get(&key).await? else {
                return doubt.ok_or_else(|| ClusterError::NoReservation(name.to_owned()));
            };
            let record: ReservationRecord = decode(&key, &found.value)?;
            let mut end = Transaction::default().expect(&key, Expect::Revision(found.revision)).delete(&key);
            let mut freed = Vec::new();
            for address in &record.addresses {
                let key = address_key(*address);
                let Some(there) = self.directory.get(&key).await? else { continue };
                // A change of any of them meanwhile is a job's that begins or ends.
                end = end.expect(&key, Expect::Revision(there.revision));
                if let AddressRecord::Reserved { .. } = decode(&key, &there.value)? {
                    end = end.put(&key, encode(&AddressRecord::Resting { last: None }));
                    freed.push(*address);
                }
            }
            match self.directory.transact(&end).await {
                Ok(Outcome::Done(revision)) => {
                    let mut state = self.state();
                    for address in freed {
                        state.allocator.rest(address, revision, self.now());
                    }
                    return Ok(record);
                }
                Ok(Outcome::Conflict { .. }) => {}
                // The next look shows whether it was done. The allocator learns of it by looking, too.
                Err(DirectoryError::Unknown(_)) if unanswered + 1 < TRIES => {
                    unanswered += 1;
                    doubt = Some(record);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ClusterError::Contended)
    }
}
