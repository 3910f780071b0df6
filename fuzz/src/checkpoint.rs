//! Arbitrary bytes as a safetensors file.
//!
//! The parser takes memory in proportion to the file, whatever sizes the file claims. What it accepts
//! tiles the data area, and the reference crate accepts it too and sees the same tensors: polytape is
//! stricter, never laxer.

use std::{collections::BTreeMap, ops::Range, path::Path};

use polytape::formats::safetensors::{MAX_DIMS, TensorInfo, parse_header};
use safetensors::SafeTensors;

use crate::{memory::peak_bytes, messages::assert_presentable};

/// A short file's tensors, read by polytape's parser.
pub fn check(data: &[u8]) {
    let name = "fuzz.safetensors";
    let (outcome, n_bytes) = peak_bytes(|| parse_header(data, Path::new(name)));
    // A tensor takes at least 50 bytes of the header and some 500 in two maps.
    let allowed = 16 * data.len() + (64 << 10);
    assert!(n_bytes <= allowed, "{n_bytes} bytes for a file of {}", data.len());
    let header = match outcome {
        Ok(header) => header,
        Err(error) => return assert_presentable(&error, name),
    };

    let (n, theirs) = SafeTensors::read_metadata(data).expect("the reference crate accepts it");
    SafeTensors::deserialize(data).expect("the reference crate accepts it");
    let data_start = 8 + n;
    assert_tiles(&header.tensors, data_start..data.len());

    let their_metadata = theirs.metadata().clone().unwrap_or_default();
    assert_eq!(header.metadata, BTreeMap::from_iter(their_metadata));
    let their_tensors = theirs.tensors();
    assert_eq!(header.tensors.len(), their_tensors.len());
    for (name, ours) in &header.tensors {
        let theirs = their_tensors[name];
        let (start, end) = theirs.data_offsets;
        assert_eq!(ours.dtype.name(), format!("{:?}", theirs.dtype));
        assert_eq!(ours.shape, theirs.shape);
        assert_eq!(ours.range, data_start + start..data_start + end);
        assert!(ours.shape.len() <= MAX_DIMS);
    }
}

fn assert_tiles(tensors: &BTreeMap<String, TensorInfo>, data: Range<usize>) {
    let mut ranges: Vec<Range<usize>> = tensors.values().map(|info| info.range.clone()).collect();
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut at = data.start;
    for range in ranges {
        assert_eq!(range.start, at, "a hole or an overlap");
        at = range.end;
    }
    assert_eq!(at, data.end, "bytes of no tensor");
}
