//! The bytes of an archive file, unpacked: a series of gzip members (RFC 1952), in Common Crawl's files one for each record, or plain bytes.
//!
//! What cannot be unpacked costs its own member only: reading goes on at the next one that begins a record.

use std::io::{self, Read};

use flate2::{Decompress, FlushDecompress, Status};
use libdeflater::{Crc, Decompressor};
use memchr::memmem::Finder;

/// Bytes asked of the file at a time.
const READ: usize = 256 << 10;
/// A member of at most so many bytes, packed and unpacked, is unpacked in one go, which takes half of the time.
const WINDOW: usize = 128 << 10;
const ONE_GO: usize = 1 << 20;
/// Packed bytes of a member that are kept, to look for the next one from its start if it turns out to be damaged.
const KEPT: usize = 1 << 20;
/// A member that is blown up more than so many times, after so many bytes, is a bomb: real pages stay below a hundred.
const MAX_RATIO: u64 = 200;
const BOMB: u64 = 64 << 20;
/// Bytes, packed and unpacked, by which a member that was searched for is told from an accident.
const TRIAL: usize = 512;
/// Longest name or comment in a member's header.
const MAX_FIELD: usize = 4096;

/// What was added to the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Some bytes.
    Data,
    /// The end of a member; `sound` if it is what was packed. If not, what came of it may be anything.
    End { sound: bool },
    /// The end of the file.
    Eof,
}

/// Unpacks a file.
pub(super) struct Members<R> {
    file: R,
    /// Bytes of the file: those of the open member that were used are kept up to [`KEPT`], then come those that were not.
    input: Vec<u8>,
    /// Where in `input` the open member begins, as far as it is kept, and where its unused bytes do.
    start: usize,
    at: usize,
    at_end: bool,
    state: State,
    inflate: Decompress,
    crc: Crc,
    in_one_go: Decompressor,
    unpacked: Vec<u8>,
    /// What a member begins with.
    magic: Finder<'static>,
    /// Bytes read of the file, and bytes that were unpacked twice in the search for sound members.
    pub(super) read: u64,
    again: u64,
}

#[derive(PartialEq, Eq)]
enum State {
    /// Nothing is known of the file yet.
    New,
    Plain,
    /// Before a member.
    Before,
    /// Before a member, which has to be searched for.
    Lost,
    Inside,
}

/// A member's header.
enum Header {
    /// So many bytes.
    Whole(usize),
    Cut,
    Bad,
}

impl<R: Read> Members<R> {
    pub(super) fn new(file: R) -> Self {
        Self {
            file,
            input: Vec::new(),
            start: 0,
            at: 0,
            at_end: false,
            state: State::New,
            inflate: Decompress::new(false),
            crc: Crc::new(),
            in_one_go: Decompressor::new(),
            unpacked: Vec::new(),
            magic: Finder::new(&[0x1f, 0x8b, 8]),
            read: 0,
            again: 0,
        }
    }

    /// Adds to `out`, of which there must be some spare capacity.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn step(&mut self, out: &mut Vec<u8>) -> io::Result<Step> {
        loop {
            match self.state {
                State::New => {
                    self.want(READ)?;
                    // Packed, unless it looks like records.
                    let plain = self.input.starts_with(b"WARC/") || memchr::memmem::find(&self.input, b"\nWARC/").is_some();
                    self.state = if plain && !self.input.starts_with(&[0x1f, 0x8b]) { State::Plain } else { State::Before };
                }
                State::Plain => return self.plain(out),
                State::Before => match self.header()? {
                    Header::Whole(length) if self.whole(length, out)? => return Ok(Step::End { sound: true }),
                    Header::Whole(length) => self.open(length),
                    Header::Cut if self.rest().is_empty() => return Ok(Step::Eof),
                    // Zeros after the last member are no damage: tapes and disks leave them (RFC 1952 is silent, gzip(1) passes over them).
                    _ if self.only_zeros()? => return Ok(Step::Eof),
                    Header::Cut | Header::Bad => {
                        self.state = State::Lost;
                        return Ok(Step::End { sound: false });
                    }
                },
                State::Lost => {
                    if !self.search()? {
                        return Ok(Step::Eof);
                    }
                }
                State::Inside => return self.inflate(out),
            }
        }
    }

    fn rest(&self) -> &[u8] {
        &self.input[self.at..]
    }

    /// Reads until `n` unused bytes are there, or the file ends.
    fn want(&mut self, n: usize) -> io::Result<()> {
        while self.input.len() - self.at < n && !self.at_end {
            if self.at - self.start > KEPT {
                self.start = self.at - KEPT;
            }
            if self.start >= KEPT {
                self.input.drain(..self.start);
                self.at -= self.start;
                self.start = 0;
            }
            let read = self.file.by_ref().take(READ as u64).read_to_end(&mut self.input)?;
            self.at_end = read < READ;
            self.read += read as u64;
        }
        Ok(())
    }

    fn plain(&mut self, out: &mut Vec<u8>) -> io::Result<Step> {
        self.want(1)?;
        let n = self.rest().len().min(out.capacity() - out.len());
        out.extend_from_slice(&self.input[self.at..self.at + n]);
        self.at += n;
        self.start = self.at;
        Ok(if n == 0 { Step::Eof } else { Step::Data })
    }

    /// The header at the place reached, read whole if it can be.
    fn header(&mut self) -> io::Result<Header> {
        // Only a header with long fields is longer than what a first look shows.
        self.want(512)?;
        match header(self.rest()) {
            Header::Cut if !self.at_end => {
                self.want(4 * MAX_FIELD + (64 << 10))?;
                Ok(header(self.rest()))
            }
            known => Ok(known),
        }
    }

    fn only_zeros(&mut self) -> io::Result<bool> {
        let zeros = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
        self.want(1)?;
        while !self.rest().is_empty() && zeros(self.rest()) {
            self.at = self.input.len();
            self.start = self.at;
            self.want(1)?;
        }
        Ok(self.rest().is_empty())
    }

    /// Unpacks the member whose header has `length` bytes, if it is sound and small; `out` grows if need be.
    fn whole(&mut self, length: usize, out: &mut Vec<u8>) -> io::Result<bool> {
        self.want(WINDOW)?;
        self.unpacked.resize(ONE_GO, 0);
        let packed = &self.input[self.at + length..];
        let packed = &packed[..packed.len().min(WINDOW)];
        let Ok(unpacked) = self.in_one_go.deflate_decompress(packed, &mut self.unpacked) else { return Ok(false) };
        let unpacked = &self.unpacked[..unpacked];
        // Where the packed bytes ended is not told; there stand their checksum and length, mostly before another header.
        let sum = libdeflater::crc32(unpacked).to_le_bytes();
        let trailer = [sum, u32::try_from(unpacked.len()).unwrap_or(0).to_le_bytes()].concat();
        let before_next = self.magic.find(packed).filter(|next| packed[..*next].ends_with(&trailer));
        let found = before_next.or_else(|| Some(memchr::memmem::find(packed, &trailer)? + trailer.len()));
        let Some(end) = found else { return Ok(false) };
        out.extend_from_slice(unpacked);
        self.at += length + end;
        self.start = self.at;
        Ok(true)
    }

    /// Goes into the member whose header has `length` bytes.
    fn open(&mut self, length: usize) {
        self.start = self.at;
        self.at += length;
        self.inflate.reset(false);
        self.crc = Crc::new();
        self.state = State::Inside;
    }

    fn inflate(&mut self, out: &mut Vec<u8>) -> io::Result<Step> {
        loop {
            self.want(1)?;
            let (before_in, before_out) = (self.inflate.total_in(), out.len());
            let status = self.inflate.decompress_vec(&self.input[self.at..], out, FlushDecompress::None);
            self.at += usize::try_from(self.inflate.total_in() - before_in).unwrap_or(0);
            self.crc.update(&out[before_out..]);
            let bomb = self.inflate.total_out() > BOMB && self.inflate.total_out() / MAX_RATIO > self.inflate.total_in();
            match status {
                Ok(Status::StreamEnd) => {
                    self.want(8)?;
                    // The length counts modulo 2^32.
                    let amount = self.inflate.total_out() as u32;
                    let whole = [self.crc.sum().to_le_bytes(), amount.to_le_bytes()].concat();
                    if !self.rest().starts_with(&whole) {
                        return Ok(self.lose());
                    }
                    self.at += whole.len();
                    self.start = self.at;
                    self.state = State::Before;
                    return Ok(Step::End { sound: true });
                }
                Ok(_) if bomb => return Ok(self.lose()),
                Ok(_) if out.len() > before_out => return Ok(Step::Data),
                // The file ends within the member, or the stream goes on with neither bytes nor room lacking.
                Ok(_) if (self.rest().is_empty() && self.at_end) || self.inflate.total_in() == before_in => {
                    return Ok(self.lose());
                }
                Ok(_) => {}
                Err(_) => return Ok(self.lose()),
            }
        }
    }

    /// Leaves a damaged member. The next one is searched for from behind this one's first byte, as far as that is kept: a member that was
    /// cut short has run into the one after it. That is work done again, of which there may be only so much in a file.
    fn lose(&mut self) -> Step {
        self.state = State::Lost;
        let used = (self.at - self.start) as u64;
        if self.again + used <= self.read + (KEPT as u64) * 16 {
            self.again += used;
            self.at = self.start;
        }
        self.at = (self.at + 1).min(self.input.len());
        self.start = self.at;
        Step::End { sound: false }
    }

    /// Finds the next member that begins a record, and goes into it; `false` at the end of the file.
    fn search(&mut self) -> io::Result<bool> {
        let mut trial = Vec::with_capacity(TRIAL);
        loop {
            self.want(3)?;
            let Some(found) = self.magic.find(self.rest()) else {
                // A magic number may be cut by the end of what was read.
                self.at = self.input.len() - self.rest().len().min(2);
                self.start = self.at;
                if self.at_end {
                    return Ok(false);
                }
                self.want(3)?;
                continue;
            };
            self.at += found;
            self.start = self.at;
            if let Header::Whole(length) = self.header()? {
                self.want(length + TRIAL)?;
                trial.clear();
                self.inflate.reset(false);
                let packed = &self.input[self.at + length..];
                let packed = &packed[..packed.len().min(TRIAL)];
                let _ = self.inflate.decompress_vec(packed, &mut trial, FlushDecompress::None);
                if trial.starts_with(b"WARC/") {
                    self.open(length);
                    return Ok(true);
                }
            }
            self.at += 1;
            self.start = self.at;
        }
    }
}

/// Reads the header of a member at the start of `bytes` (RFC 1952, 2.3).
fn header(bytes: &[u8]) -> Header {
    let is_bad = |at: usize, good: fn(u8) -> bool| bytes.get(at).is_some_and(|b| !good(*b));
    if is_bad(0, |b| b == 0x1f) || is_bad(1, |b| b == 0x8b) || is_bad(2, |b| b == 8) || is_bad(3, |b| b & 0xe0 == 0) {
        return Header::Bad;
    }
    if bytes.len() < 10 {
        return Header::Cut;
    }
    let flags = bytes[3];
    let mut at = 10;
    if flags & 4 != 0 {
        let Some(length) = bytes.get(at..at + 2) else { return Header::Cut };
        at += 2 + usize::from(u16::from_le_bytes([length[0], length[1]]));
    }
    for flag in [8, 16] {
        if flags & flag != 0 {
            let Some(field) = bytes.get(at..) else { return Header::Cut };
            match memchr::memchr(0, &field[..field.len().min(MAX_FIELD)]) {
                Some(end) => at += end + 1,
                None if field.len() < MAX_FIELD => return Header::Cut,
                None => return Header::Bad,
            }
        }
    }
    at += if flags & 2 != 0 { 2 } else { 0 };
    if at > bytes.len() { Header::Cut } else { Header::Whole(at) }
}
