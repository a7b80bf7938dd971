//! The records of a WARC file (ISO 28500; WAT files are WARC files too), some at a time, in bounded memory whatever their headers say.

use std::io::{self, Read};
use std::ops::Range;

use memchr::memmem;

use super::members::{Members, Step};

/// Unpacked bytes after which records are handed on.
const BATCH: usize = 256 << 10;
/// Longest record that is kept. Common Crawl cuts pages at 5 MiB; of such a page the WAT record may be twice as long.
pub(super) const MAX_RECORD: usize = 16 << 20;
/// Longest header of a record.
const MAX_HEAD: usize = 64 << 10;
/// Line ends after a record that are waited for: there should be two.
const MAX_BLANK: usize = 16;
/// Room that is made for unpacked bytes at a time.
const ROOM: usize = 64 << 10;

/// Records, and the bytes that they point into.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    records: Vec<Record>,
    /// Records that were passed over: cut, damaged, without a readable header.
    pub(super) bad: u64,
    /// Records that were passed over because they are longer than [`MAX_RECORD`].
    pub(super) too_long: u64,
    /// Bytes of the file read so far.
    pub(super) read: u64,
}

struct Record {
    head: Range<usize>,
    block: Range<usize>,
}

/// One record.
#[derive(Clone, Copy)]
pub(super) struct RecordRef<'a> {
    head: &'a [u8],
    /// What follows the header.
    pub(super) block: &'a [u8],
}

impl Batch {
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = RecordRef<'_>> {
        let of = |r: &Record| RecordRef { head: &self.bytes[r.head.clone()], block: &self.bytes[r.block.clone()] };
        self.records.iter().map(of)
    }
}

impl<'a> RecordRef<'a> {
    /// The value of a header field; `name` in lower case.
    pub(super) fn field(&self, name: &str) -> Option<&'a [u8]> {
        field(self.head, name)
    }

    /// The address that the record is about, without the angle brackets of old writers.
    pub(super) fn target(&self) -> Option<&'a str> {
        let uri = std::str::from_utf8(self.field("warc-target-uri")?).ok()?;
        Some(uri.strip_prefix('<').and_then(|u| u.strip_suffix('>')).unwrap_or(uri))
    }
}

fn field<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut rest = head;
    while !rest.is_empty() {
        let line;
        (line, rest) = rest.split_at(memchr::memchr(b'\n', rest).map_or(rest.len(), |end| end + 1));
        let line = line.trim_ascii_start();
        if let Some((key, value)) = line.split_at_checked(name.len())
            && key.eq_ignore_ascii_case(name.as_bytes())
            && let Some(value) = value.trim_ascii_start().strip_prefix(b":")
        {
            return Some(value.trim_ascii());
        }
    }
    None
}

/// Reads the records of a file.
pub(super) struct Records<R> {
    members: Members<R>,
    batch: Batch,
    /// Where in the batch's bytes those begin that belong to no record yet.
    at: usize,
    state: State,
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// A record comes, after line ends.
    Between,
    /// Its header has been read; it ends here.
    Within { head: usize, end: usize },
    /// Something has gone wrong: what comes is passed over, up to the next record or member.
    Lost,
}

/// What the bytes at the place of a record's header are.
enum Head {
    Whole { length: usize, content: u64 },
    Cut,
    Bad,
}

impl<R: Read> Records<R> {
    pub(super) fn new(file: R) -> Self {
        Self { members: Members::new(file), batch: Batch::default(), at: 0, state: State::Between, ended: false }
    }

    /// The next records; `None` at the end of the file. A record is in it only once the next one or the end of its member was reached
    /// in good order.
    ///
    /// # Errors
    /// Those of the file. What is wrong in the file is none: it is counted in the batch.
    pub(super) fn next_batch(&mut self) -> io::Result<Option<Batch>> {
        while !self.ended {
            self.batch.bytes.reserve(ROOM);
            match self.members.step(&mut self.batch.bytes)? {
                Step::Data => self.take(),
                Step::End { sound } => self.end(sound),
                Step::Eof => {
                    self.end(true);
                    self.ended = true;
                }
            }
            if self.at >= BATCH {
                return Ok(Some(self.hand_on()));
            }
        }
        let last = self.hand_on();
        let is_empty = last.records.is_empty() && last.bad + last.too_long == 0;
        Ok((!is_empty).then_some(last))
    }

    /// All records that are known to be sound; what follows them stays.
    fn hand_on(&mut self) -> Batch {
        let mut bytes = Vec::with_capacity(BATCH + BATCH / 4);
        bytes.extend_from_slice(&self.batch.bytes[self.at..]);
        self.batch.bytes.truncate(self.at);
        let mut whole = std::mem::replace(&mut self.batch, Batch { bytes, ..Batch::default() });
        whole.read = self.members.read;
        if let State::Within { head, end } = &mut self.state {
            (*head, *end) = (*head - self.at, *end - self.at);
        }
        self.at = 0;
        whole
    }

    /// Makes records of the bytes that there are.
    fn take(&mut self) {
        loop {
            match self.state {
                State::Between => {
                    let rest = &self.batch.bytes[self.at..];
                    let blank = rest.iter().take_while(|b| matches!(**b, b'\r' | b'\n')).count();
                    self.at += blank;
                    match head(&rest[blank..]) {
                        Head::Cut => return,
                        Head::Bad => self.lose(),
                        Head::Whole { length, content } => match usize::try_from(content) {
                            Ok(content) if content <= MAX_RECORD => {
                                let head = self.at + length;
                                self.state = State::Within { head, end: head + content };
                            }
                            // So long a length may be a lie: the next record is searched for.
                            _ => {
                                self.batch.too_long += 1;
                                self.at += length;
                                self.state = State::Lost;
                            }
                        },
                    }
                }
                State::Within { head, end } => {
                    // It counts when its end is seen to be one.
                    let after = self.batch.bytes.get(end..).unwrap_or_default();
                    let blank = after.iter().take_while(|b| matches!(**b, b'\r' | b'\n')).count();
                    if blank == after.len() {
                        if blank <= MAX_BLANK {
                            return;
                        }
                        self.keep(head, end);
                        continue;
                    }
                    if blank < 2 || !b"WARC/".starts_with(&after[blank..][..after.len().saturating_sub(blank).min(5)]) {
                        self.lose();
                        continue;
                    }
                    if after.len() - blank < 5 {
                        return;
                    }
                    self.keep(head, end);
                }
                State::Lost => {
                    let rest = &self.batch.bytes[self.at..];
                    if let Some(found) = memmem::find(rest, b"\nWARC/") {
                        self.at += found + 1;
                        self.state = State::Between;
                    } else {
                        self.drop_bytes(5);
                        return;
                    }
                }
            }
        }
    }

    fn keep(&mut self, head: usize, end: usize) {
        self.batch.records.push(Record { head: self.at..head, block: head..end });
        self.at = end;
        self.state = State::Between;
    }

    /// Gives a record up; its own block is searched for the next one, in case its length was a lie.
    fn lose(&mut self) {
        self.batch.bad += 1;
        self.at = (self.at + 1).min(self.batch.bytes.len());
        self.state = State::Lost;
    }

    /// Frees all bytes that belong to no record, but for the last few.
    fn drop_bytes(&mut self, keep: usize) {
        let to = self.batch.bytes.len().saturating_sub(keep).max(self.at);
        self.batch.bytes.drain(self.at..to);
    }

    /// At the end of a member, or of the file, a record ends too.
    fn end(&mut self, sound: bool) {
        self.take();
        while let State::Within { end, .. } = self.state
            && sound
            && end > self.batch.bytes.len()
        {
            self.lose();
            self.take();
        }
        match self.state {
            State::Within { head, end } if sound && end <= self.batch.bytes.len() => self.keep(head, end),
            State::Within { .. } => self.batch.bad += 1,
            State::Between => {
                let only_blank = self.batch.bytes[self.at..].trim_ascii().is_empty();
                self.batch.bad += u64::from(!sound || !only_blank);
            }
            State::Lost => {}
        }
        self.batch.bytes.truncate(self.at);
        self.state = State::Between;
    }
}

/// Reads a record's header at the start of `bytes`.
fn head(bytes: &[u8]) -> Head {
    let version = b"WARC/";
    let seen = bytes.len().min(version.len());
    if bytes[..seen] != version[..seen] {
        return Head::Bad;
    }
    // By the standard lines end with CR LF; some writers leave the CR out.
    let window = &bytes[..bytes.len().min(MAX_HEAD)];
    let mut length = 0;
    loop {
        let Some(end) = memchr::memchr(b'\n', &window[length..]) else {
            return if bytes.len() < MAX_HEAD { Head::Cut } else { Head::Bad };
        };
        let is_last = matches!(&window[length..length + end], b"" | b"\r");
        length += end + 1;
        if is_last {
            break;
        }
    }
    let content = field(&bytes[..length], "content-length").and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
    content.map_or(Head::Bad, |content| Head::Whole { length, content })
}
