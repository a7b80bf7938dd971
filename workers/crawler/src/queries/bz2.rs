//! A bzip2 file of many streams, unpacked side by side and read in order.
//!
//! Wikipedia's multistream dumps hold a stream for each hundred pages, parallel packers one for each 900 kB. A stream starts at a whole
//! byte with `BZh`, its level, and the 48 bits that start a block (the digits of pi), so streams are found without the dump's index: by
//! chance those 80 bits stand elsewhere once in 10^24 bytes, and then unpacking says that the file is damaged. A stream that is longer than
//! a window is unpacked by the thread that reads, as it comes.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bzip2::bufread::{BzDecoder, MultiBzDecoder};
use memchr::memmem::Finder;

/// Bytes of packed data that are searched for the next stream, and bytes of unpacked data handed over at a time.
const WINDOW: usize = 4 << 20;
const PIECE: usize = 1 << 20;
/// Pieces that a stream may be ahead of its reader: what bounds the memory if a stream unpacks to terabytes.
const AHEAD: usize = 4;
const BLOCK: &[u8] = b"1AY&SY";

type Pieces = Receiver<io::Result<Vec<u8>>>;
type Sink = SyncSender<io::Result<Vec<u8>>>;

/// Reads the unpacked bytes. Threads end with it.
pub(super) struct ParallelBz2 {
    streams: Receiver<Pieces>,
    current: Option<Pieces>,
    piece: io::Cursor<Vec<u8>>,
}

impl ParallelBz2 {
    /// Starts `threads` unpackers and one thread that reads `file`.
    pub(super) fn new(file: impl Read + Send + 'static, threads: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let (order, streams) = sync_channel(2 * threads);
        let (jobs, queue) = sync_channel::<(Vec<u8>, Sink)>(threads);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let queue = Arc::clone(&queue);
            thread::Builder::new().name("bz2".to_owned()).spawn(move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((packed, sink)) = job else { return };
                    unpack(MultiBzDecoder::new(packed.as_slice()), &sink);
                }
            })?;
        }
        thread::Builder::new().name("bz2-read".to_owned()).spawn(move || split(Window::new(file), &order, &jobs))?;
        Ok(Self { streams, current: None, piece: io::Cursor::default() })
    }
}

impl Read for ParallelBz2 {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.piece.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            match self.current.as_ref().map(Receiver::recv) {
                Some(Ok(piece)) => self.piece = io::Cursor::new(piece?),
                // The stream is over, or none has begun.
                Some(Err(_)) | None => match self.streams.recv() {
                    Ok(next) => self.current = Some(next),
                    Err(_) => return Ok(0),
                },
            }
        }
    }
}

/// Hands a stream's bytes over; ends early if nobody wants them.
fn unpack(mut from: impl Read, sink: &Sink) {
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let piece = match (&mut from).take(PIECE as u64).read_to_end(&mut piece) {
            Ok(0) => return,
            Ok(_) => Ok(piece),
            Err(e) => Err(e),
        };
        let failed = piece.is_err();
        if sink.send(piece).is_err() || failed {
            return;
        }
    }
}

/// Cuts the file into streams. The order goes out before the job, so the reader always waits for a stream that somebody unpacks.
fn split<R: Read>(mut window: Window<R>, order: &SyncSender<Pieces>, jobs: &SyncSender<(Vec<u8>, Sink)>) {
    loop {
        let (sink, pieces) = sync_channel(AHEAD);
        let found = window.next_stream();
        if matches!(found, Ok(Stream::End)) || order.send(pieces).is_err() {
            return;
        }
        match found {
            Ok(Stream::Whole(packed)) => {
                if jobs.send((packed, sink)).is_err() {
                    return;
                }
            }
            Ok(Stream::Long) => unpack(BzDecoder::new(&mut window), &sink),
            Ok(Stream::End) => return,
            Err(e) => {
                let _ = sink.send(Err(e));
                return;
            }
        }
    }
}

enum Stream {
    Whole(Vec<u8>),
    /// It ends outside the window.
    Long,
    End,
}

/// The packed bytes, a few megabytes ahead.
struct Window<R> {
    file: R,
    bytes: Vec<u8>,
    start: usize,
    ended: bool,
    block: Finder<'static>,
}

impl<R: Read> Window<R> {
    fn new(file: R) -> Self {
        Self { file, bytes: Vec::new(), start: 0, ended: false, block: Finder::new(BLOCK) }
    }

    /// Reads up to `wanted` more bytes.
    fn fill(&mut self, wanted: usize) -> io::Result<()> {
        self.bytes.drain(..self.start);
        self.start = 0;
        if (&mut self.file).take(wanted as u64).read_to_end(&mut self.bytes)? < wanted {
            self.ended = true;
        }
        Ok(())
    }

    fn next_stream(&mut self) -> io::Result<Stream> {
        let mut searched = 1;
        loop {
            let held = &self.bytes[self.start..];
            // Where a stream starts behind the one that starts here.
            while let Some(block) = held.get(searched..).and_then(|rest| self.block.find(rest)) {
                let at = (searched + block).saturating_sub(4);
                searched += block + 1;
                if at > 0 && held[at..].starts_with(b"BZh") && matches!(held[at + 3], b'1'..=b'9') {
                    let packed = held[..at].to_vec();
                    self.start += at;
                    return Ok(Stream::Whole(packed));
                }
            }
            if self.ended {
                let packed = held.to_vec();
                self.start = self.bytes.len();
                return Ok(if packed.is_empty() { Stream::End } else { Stream::Whole(packed) });
            }
            if held.len() >= WINDOW {
                return Ok(Stream::Long);
            }
            searched = held.len().saturating_sub(BLOCK.len()).max(1);
            self.fill(PIECE)?;
        }
    }
}

impl<R: Read> Read for Window<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}

impl<R: Read> BufRead for Window<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.bytes.len() && !self.ended {
            self.fill(PIECE)?;
        }
        Ok(&self.bytes[self.start..])
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bzip2::Compression;
    use bzip2::write::BzEncoder;
    use proptest::prelude::*;
    use std::io::Write;

    fn pack(bytes: &[u8]) -> Vec<u8> {
        let mut out = BzEncoder::new(Vec::new(), Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn unpacked(packed: Vec<u8>, threads: usize) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        ParallelBz2::new(io::Cursor::new(packed), threads)?.read_to_end(&mut out)?;
        Ok(out)
    }

    /// Bytes that do not pack.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn a_long_stream_between_short_ones() {
        let parts = [b"first".to_vec(), noise(WINDOW + WINDOW / 2), Vec::new(), b"last".to_vec(), vec![0; 5 * PIECE]];
        let packed: Vec<u8> = parts.iter().flat_map(|p| pack(p)).collect();
        assert!(packed.len() > WINDOW);
        assert!(unpacked(packed, 2).unwrap() == parts.concat());
    }

    #[test]
    fn damage_is_an_error() {
        let packed: Vec<u8> = (0..5).flat_map(|i| pack(format!("stream {i} ").repeat(50).as_bytes())).collect();
        for cut in [packed.len() - 1, packed.len() - 11, packed.len() / 2, 5] {
            assert!(unpacked(packed[..cut].to_vec(), 2).is_err(), "{cut}");
        }
        let mut flipped = packed.clone();
        flipped[packed.len() / 2] ^= 0x10;
        assert!(unpacked(flipped, 2).is_err());
        let mut tail = packed;
        tail.extend_from_slice(b"not a stream");
        assert!(unpacked(tail, 2).is_err());
    }

    #[test]
    fn a_reader_that_leaves_stops_the_threads() {
        let packed: Vec<u8> = std::iter::repeat_n(pack(&vec![7; 3 * PIECE]), 40).flatten().collect();
        let mut reader = ParallelBz2::new(io::Cursor::new(packed), 2).unwrap();
        assert_eq!(reader.read(&mut [0; 10]).unwrap(), 10);
    }

    proptest! {
        #[test]
        fn streams_come_back_in_order(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..12), threads in 1_usize..4) {
            let packed: Vec<u8> = parts.iter().flat_map(|p| pack(p)).collect();
            prop_assert_eq!(unpacked(packed, threads).unwrap(), parts.concat());
        }

        #[test]
        fn foreign_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            bytes.splice(0..0, *b"BZh91AY&SY");
            let _ = unpacked(bytes, 1);
        }
    }
}
