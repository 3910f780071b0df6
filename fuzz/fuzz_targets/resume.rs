#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polytape_fuzz::resume::check(data));
