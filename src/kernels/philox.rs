//! Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC'11).
//!
//! A block of four words is a pure function of a key and a counter, so a draw is named by what it is
//! for (seed, purpose, step, layer, example, ...), not by when it is made. Recomputation replays it,
//! and the number of threads, the batch split and the device do not change it.

/// What a stream of random numbers is for. Streams of different purposes are unrelated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial values of A, B and the router.
    Init = 1,
    /// Relaxed Bernoulli routing.
    Router = 2,
    /// Dropout of the base.
    Dropout = 3,
    /// Order of the training rows.
    Shuffle = 4,
    /// Random weights and ids of `init`, `bench` and tests.
    Data = 5,
    /// Tokens of `generate`.
    Sample = 6,
}

/// The key of a stream: a seed, a purpose and a step, hashed into 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key([u32; 2]);

impl Key {
    /// The key of a purpose's stream at an optimiser step (0 where there is none).
    pub fn new(seed: u64, purpose: Purpose, step: u64) -> Self {
        let mut state = seed;
        for part in [purpose as u64, step] {
            state = splitmix(state ^ part.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        }
        Self([state as u32, (state >> 32) as u32])
    }

    /// The key with these 64 bits, for known-answer tests.
    pub fn from_words(words: [u32; 2]) -> Self {
        Self(words)
    }

    /// The 64 bits, for backends whose kernels are not Rust.
    pub fn words(self) -> [u32; 2] {
        self.0
    }

    /// The four words at a counter.
    #[inline(always)] // Kernels vectorise the loop around it.
    pub fn block(self, counter: [u32; 4]) -> [u32; 4] {
        let [mut k0, mut k1] = self.0;
        let [mut c0, mut c1, mut c2, mut c3] = counter;
        for _ in 0..10 {
            let p0 = u64::from(c0) * 0xD251_1F53;
            let p1 = u64::from(c2) * 0xCD9E_8D57;
            (c0, c1, c2, c3) =
                ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        [c0, c1, c2, c3]
    }

    /// Draw `index` of a plain sequence, uniform in `[0, 1)` with 24 bits.
    pub fn uniform(self, index: u64) -> f32 {
        let block = self.block([(index / 4) as u32, ((index / 4) >> 32) as u32, 0, 0]);
        unit(block[(index % 4) as usize])
    }

    /// Draw `index` of a plain sequence, uniform over 32 bits.
    pub fn word(self, index: u64) -> u32 {
        self.block([(index / 4) as u32, ((index / 4) >> 32) as u32, 0, 0])[(index % 4) as usize]
    }
}

/// A word as a uniform number in `[0, 1)` with 24 bits.
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the Random123 library (philox 4x32, 10 rounds).
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(Key::from_words(key).block(counter), expected);
        }
    }
}
