//! Numbered places that remember how often they were used.

use serde::{Deserialize, Serialize};

/// A vector with holes. A place that is used again has a new generation, so that old names don't fit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Place<T> {
    generation: u32,
    value: Option<T>,
    /// It has not been touched since [`Slab::mark_told`].
    #[serde(skip)]
    told: bool,
}

/// A slab without the values that were told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Rest<T> {
    /// How many places there are.
    places: u32,
    /// Those with a value that was told.
    told: Vec<u32>,
    /// All others.
    others: Vec<(u32, Place<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Puts a value into a free place. Returns its index and generation.
    pub(crate) fn insert(&mut self, make: impl FnOnce(u32, u32) -> T) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, value: None, told: false });
            u32::try_from(self.places.len() - 1).expect("fewer sockets than 2^32")
        });
        let place = &mut self.places[index as usize];
        place.generation = place.generation.wrapping_add(1);
        place.told = false;
        place.value = Some(make(index, place.generation));
        index
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let place = self.places.get_mut(index as usize)?;
        let value = place.value.take()?;
        place.told = false;
        self.free.push(index);
        Some(value)
    }

    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        self.places.get(index as usize)?.value.as_ref()
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        let place = self.places.get_mut(index as usize)?;
        place.told = false;
        place.value.as_mut()
    }

    /// Notes that somebody has a copy of this value; it counts until the value is touched.
    pub(crate) fn mark_told(&mut self, index: u32) {
        if let Some(place) = self.places.get_mut(index as usize) {
            place.told = place.value.is_some();
        }
    }

    pub(crate) fn is_told(&self, index: u32) -> bool {
        self.places.get(index as usize).is_some_and(|place| place.told)
    }

    pub(crate) fn forget_told(&mut self) {
        self.places.iter_mut().for_each(|place| place.told = false);
    }

    /// A copy without the values that were told.
    pub(crate) fn rest(&self) -> Rest<T>
    where
        T: Clone,
    {
        let (told, others): (Vec<_>, Vec<_>) = (0..).zip(&self.places).partition(|(_, place)| place.told);
        Rest {
            places: u32::try_from(self.places.len()).unwrap_or(u32::MAX),
            told: told.into_iter().map(|(index, _)| index).collect(),
            others: others.into_iter().map(|(index, place)| (index, place.clone())).collect(),
            free: self.free.clone(),
        }
    }

    /// The whole slab: the rest, and the values with their generations that `take` has of what was told. Fails with the index of
    /// a place that is missing or there twice.
    pub(crate) fn complete(rest: Rest<T>, mut take: impl FnMut(u32) -> Option<(u32, T)>) -> Result<Slab<T>, u32> {
        let Rest { places: count, told, others, free } = rest;
        if told.len() + others.len() != count as usize {
            return Err(count);
        }
        // By place.
        let mut is_set = vec![false; count as usize];
        let mut set =
            |index: u32| is_set.get_mut(index as usize).is_some_and(|is_set| !std::mem::replace(is_set, true));
        let mut places = Vec::new();
        places.resize_with(count as usize, || Place { generation: 0, value: None, told: false });
        for index in told {
            let (generation, value) = take(index).filter(|_| set(index)).ok_or(index)?;
            places[index as usize] = Place { generation, value: Some(value), told: false };
        }
        for (index, place) in others {
            if !set(index) {
                return Err(index);
            }
            places[index as usize] = place;
        }
        Ok(Slab { places, free })
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> + '_ {
        self.places.iter().enumerate().filter_map(|(index, place)| {
            let index = u32::try_from(index).ok()?;
            Some((index, place.value.as_ref()?))
        })
    }

    /// Whether the list of free places is right; for images.
    pub(crate) fn is_consistent(&self) -> bool {
        let mut free = self.free.clone();
        free.sort_unstable();
        free.dedup();
        let holes = self.places.iter().filter(|place| place.value.is_none()).count();
        free.len() == self.free.len()
            && free.len() == holes
            && free.iter().all(|&index| self.places.get(index as usize).is_some_and(|place| place.value.is_none()))
    }
}
