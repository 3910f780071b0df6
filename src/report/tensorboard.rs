//! TensorBoard event files: scalars by step.
//!
//! ```text
//! record   length u64 | masked CRC32C of it u32 | event | masked CRC32C of the event u32      (TFRecord)
//! event    1 wall_time f64   2 step int64   3 file_version string   5 summary   7 session_log (protobuf)
//! summary  1 value { 1 tag string   2 simple_value f32 }       session_log  1 status: 1 is START
//! ```
//!
//! From TensorFlow's `record_writer.cc`, `event.proto` and `summary.proto`. Little-endian; a CRC is
//! rotated and offset so that the CRC of data that holds CRCs is not weak.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    error::{Error, Result},
    formats::disk,
};

/// Writes one event file.
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// A new event file in a folder. A run that goes on at step `from` adds one: TensorBoard reads all that are there, and
    /// what they have of that step and later ones counts no more.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(dir: &Path, from: Option<u64>) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The name must have "tfevents" in it; TensorBoard reads the files in the order of their names.
        let name = format!(
            "events.out.tfevents.{:010}.polytape.{}.{}",
            now.as_secs(),
            std::process::id(),
            now.subsec_nanos()
        );
        let path = dir.join(name);
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { path, file: BufWriter::new(file) };
        let mut event = Vec::new();
        wall_time(&mut event, now.as_secs_f64());
        bytes_field(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        if let Some(step) = from {
            let mut event = Vec::new();
            wall_time(&mut event, now.as_secs_f64());
            event.push(2 << 3);
            varint(&mut event, step);
            bytes_field(&mut event, 7, &[1 << 3, 1]); // START
            writer.record(&event)?;
        }
        Ok(writer)
    }

    /// Removes the event files of an earlier run, those that are written here.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn remove_all(dir: &Path) -> Result<()> {
        let Ok(entries) = fs::read_dir(dir) else { return Ok(()) }; // There are none.
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("events.out.tfevents.") && name.contains(".polytape.") {
                disk::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Scalars of a step. They are in the file when this returns.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut summary = Vec::new();
        for &(tag, value) in values {
            let mut of_tag = Vec::new();
            bytes_field(&mut of_tag, 1, tag.as_bytes());
            of_tag.push(2 << 3 | 5);
            of_tag.extend((value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &of_tag);
        }
        let mut event = Vec::new();
        wall_time(&mut event, now.as_secs_f64());
        event.push(2 << 3);
        varint(&mut event, step);
        bytes_field(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, event: &[u8]) -> Result<()> {
        let record = record(event);
        self.file
            .write_all(&record)
            .and_then(|()| self.file.flush())
            .map_err(Error::io("write", &self.path))
    }
}

/// An event as it lies in the file.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(event);
    record.extend(masked_crc(event).to_le_bytes());
    record
}

fn wall_time(event: &mut Vec<u8>, seconds: f64) {
    event.push(1 << 3 | 1);
    event.extend(seconds.to_le_bytes());
}

fn bytes_field(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: a few hundred bytes a step.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            let low = crc & 1;
            (crc >> 1) ^ (0x82f6_3b78 & low.wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// Reads a file as TensorBoard does.
    #[test]
    fn records_are_read_back() {
        let dir = std::env::temp_dir().join(format!("polytape-events-{}", std::process::id()));
        let mut writer = EventWriter::create(&dir, Some(299)).unwrap();
        writer.scalars(300, &[("train/loss", 1.5), ("eval/loss", -2.0)]).unwrap();
        let bytes = fs::read(&writer.path).unwrap();
        let (mut at, mut events) = (0, Vec::new());
        while at < bytes.len() {
            let length = &bytes[at..at + 8];
            let n = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!(crc(at + 8), masked_crc(length));
            let event = &bytes[at + 12..at + 12 + n];
            assert_eq!(crc(at + 12 + n), masked_crc(event));
            events.push(event);
            at += 16 + n;
        }
        assert_eq!(events.len(), 3);
        assert!(events[0].ends_with(b"brain.Event:2"));
        // step: field 2, varint 299 = ab 02; then a session that starts.
        assert_eq!(events[1][9..], [2 << 3, 0xab, 0x02, 7 << 3 | 2, 2, 1 << 3, 1]);
        assert_eq!(events[2][9..12], [2 << 3, 0xac, 0x02]); // Then the summary.
        let mut value = vec![1 << 3 | 2, 17, 1 << 3 | 2, 10];
        value.extend(b"train/loss");
        value.push(2 << 3 | 5);
        value.extend(1.5_f32.to_le_bytes());
        assert_eq!(events[2][14..14 + value.len()], value);
        fs::write(dir.join("events.out.tfevents.1.somebody"), "").unwrap();
        EventWriter::remove_all(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "not another program's");
        fs::remove_dir_all(dir).unwrap();
    }
}
