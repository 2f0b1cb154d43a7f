//! Transfers in both directions of a connection.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::checksum::{Checksum, Sum};

const CHUNK: usize = 64 * 1024;

/// An endless sequence of bytes, determined by a seed: xorshift64.
#[derive(Debug)]
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        // The state must not be 0, and similar seeds must not start with similar bytes.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let bytes = self.0.to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

/// Writes `bytes` bytes of noise, at most `rate` bytes per second (0: no limit).
pub(crate) fn write_noise(mut to: impl Write, bytes: u64, seed: u64, rate: u64) -> Result<Sum> {
    let mut noise = Noise::new(seed);
    let mut checksum = Checksum::new()?;
    let mut pace = Pace::new(rate);
    let mut left = bytes;
    while left > 0 {
        let mut buffer = vec![0; pace.chunk().min(usize::try_from(left).unwrap_or(CHUNK))];
        noise.fill(&mut buffer);
        to.write_all(&buffer).with_context(|| format!("write, {left} of {bytes} bytes left"))?;
        checksum.update(&buffer)?;
        left -= buffer.len() as u64;
        pace.done(buffer.len());
    }
    checksum.finish()
}

/// Reads up to `limit` bytes or to the end, at most `rate` bytes per second (0: no limit).
pub(crate) fn read_sum(mut from: impl Read, limit: u64, rate: u64) -> Result<Sum> {
    let mut checksum = Checksum::new()?;
    let mut pace = Pace::new(rate);
    let mut buffer = vec![0; CHUNK];
    let mut left = limit;
    while left > 0 {
        let most = pace.chunk().min(usize::try_from(left).unwrap_or(CHUNK));
        let count = match from.read(&mut buffer[..most]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.with_context(|| format!("read, after {} bytes", limit - left))?,
        };
        if count == 0 {
            break;
        }
        checksum.update(&buffer[..count])?;
        left -= count as u64;
        pace.done(count);
    }
    checksum.finish()
}

/// Limits the rate of a transfer.
#[derive(Debug)]
struct Pace {
    rate: u64,
    start: Instant,
    bytes: u64,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self { rate, start: Instant::now(), bytes: 0 }
    }

    /// The number of bytes to move at a time: a slow transfer moves 20 pieces per second.
    fn chunk(&self) -> usize {
        if self.rate == 0 {
            CHUNK
        } else {
            usize::try_from(self.rate / 20).unwrap_or(CHUNK).clamp(1, CHUNK)
        }
    }

    fn done(&mut self, count: usize) {
        self.bytes += count as u64;
        if self.rate > 0 {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.rate as f64);
            std::thread::sleep(due.saturating_sub(self.start.elapsed()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_names_one_sequence() {
        let sum = |bytes, seed| {
            let mut noise = Vec::new();
            let sent = write_noise(&mut noise, bytes, seed, 0).unwrap();
            assert_eq!(noise.len() as u64, bytes);
            assert_eq!(read_sum(&noise[..], u64::MAX, 0).unwrap(), sent);
            sent
        };
        assert_eq!(sum(100_001, 7), sum(100_001, 7));
        assert_ne!(sum(100_001, 7), sum(100_001, 8));
    }

    #[test]
    fn a_checksum_is_the_known_one() {
        let sum = read_sum(&b"abc"[..], u64::MAX, 0).unwrap();
        assert_eq!(
            sum.to_string(),
            "3 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_rate_is_kept() {
        let start = Instant::now();
        read_sum(&[0; 3_000][..], u64::MAX, 10_000).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
    }
}
