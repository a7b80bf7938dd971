#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| capfilt_crawler::fuzz::run("archive", data));
