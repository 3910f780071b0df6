//! Fingerprints: 64 bits that tell whether two byte strings are the same one.
//!
//! FNV-1a. Against mistakes, not against malice: anyone can make two inputs with one fingerprint.

use std::fmt;

/// The fingerprint of the bytes so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    /// Its 64 bits.
    pub fn value(self) -> u64 {
        self.0
    }

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Adds a list of ids, with its length.
    pub fn add_ids(&mut self, ids: &[u32]) {
        self.add(&(ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| self.add(&id.to_le_bytes()));
    }

    /// Adds f32 values by their bits, with their number.
    pub fn add_values(&mut self, values: &[f32]) {
        self.add(&(values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.add(&value.to_le_bytes()));
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // From the authors' page (isthe.com/chongo/tech/comp/fnv).
        for (text, expected) in
            [("", "cbf29ce484222325"), ("a", "af63dc4c8601ec8c"), ("foobar", "85944171f73967e8")]
        {
            let mut print = Fingerprint::default();
            print.add(text.as_bytes());
            assert_eq!(print.to_string(), expected);
        }
        let of = |lists: [&[u32]; 2]| {
            let mut print = Fingerprint::default();
            lists.iter().for_each(|ids| print.add_ids(ids));
            print
        };
        assert_ne!(of([&[1], &[2, 3]]), of([&[1, 2], &[3]]), "where a list ends matters");
    }
}
