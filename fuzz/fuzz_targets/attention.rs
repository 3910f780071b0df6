#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polytape_fuzz::attention::check(data));
