//! Where the words of the queries are looked up: a table of words, and a trie of the queries that have several, its edges in a table.
//!
//! Both are larger than the near caches, so what counts is how much of them a text touches. Entries stand in the order of use, so the
//! few words that make up most of any text lie side by side; a hash only leads to an entry's number (`places.rs`). Entries are compared
//! whole, so no word is ever taken for another.

use std::collections::HashMap;
use std::collections::hash_map;

use prefetch_index::prefetch_index;

use super::places::{FIRST, NOWHERE, Places, scale};
use super::sort::sort_each;
use super::words::{Folded, SHORT};
use super::{at_least, vectorized};

/// Bits of a [`Node`] that hold the number.
const NUMBER: u32 = (1 << 24) - 1;

/// A word or the beginning of a query of several words: its number among the words or the edges, and these flags.
type Node = u32;
/// A beginning of several words: the number is that of its last edge.
const SEVERAL: Node = 1 << 31;
/// Some query goes on after it.
const GOES_ON: Node = 1 << 30;
/// It is the last word of a text; only words of texts have this.
const LAST: Node = 1 << 29;
/// No word of any query.
const UNKNOWN: Node = 0;
/// No query ends here.
const NO_QUERY: u32 = u32::MAX;

/// All words and queries of a list.
pub(super) struct Index {
    word_places: Places,
    /// By their numbers; number 0 is no word.
    words: Box<[Word]>,
    /// The long words, one after the other, and where they end, by their numbers; each begins where the one before it ends.
    long: Box<[u8]>,
    long_ends: Box<[u32]>,
    edge_places: Places,
    /// By their numbers; number 0 is no edge.
    edges: Box<[Edge]>,
    /// Two bits for each edge, both in one of these: it tells of most pairs of words that no query has them.
    filter: Box<[u64]>,
}

#[derive(Clone, Copy, Debug)]
struct Word {
    key: Key,
    node: Node,
    query: u32,
}

/// What is to be known of a word of a text.
#[derive(Default, Clone, Copy, Debug)]
struct Known {
    node: Node,
    query: u32,
}

/// The bytes of a word, if they are [`SHORT`] or fewer, else a hash and the length with [`LONG`].
type Key = [u64; 2];
/// In the last byte of a key: a byte that no text has, so that no short word has the key of a long one.
const LONG: u64 = 0xff << 56;

/// `next` follows on `from`, which leads to `to`; `query` ends there.
#[derive(Default, Clone, Copy, Debug)]
struct Edge {
    from: Node,
    next: Node,
    to: Node,
    query: u32,
}

const NO_WORD: Word = Word { key: [0; 2], node: UNKNOWN, query: NO_QUERY };
/// No word has its key.
const ANY_WORD: Word = Word { key: [u64::MAX; 2], ..NO_WORD };
const NO_EDGE: Edge = Edge { from: UNKNOWN, next: UNKNOWN, to: UNKNOWN, query: NO_QUERY };

/// What [`Index::find`] keeps between its steps; it is there to be used again.
#[derive(Default, Debug)]
pub(super) struct Steps {
    /// Of each word.
    keys: Vec<(Key, u64)>,
    numbers: Vec<u32>,
    words: Vec<Known>,
    /// The words that stand elsewhere, are long, or are none of any query; then the pairs that stand elsewhere or go on.
    others: Vec<u32>,
    /// Of each pair of words that a query may have: the place of the first in the texts, and the hash.
    pairs: Vec<(u32, u64)>,
    /// Of each word the query that it and the next one are together.
    twos: Vec<u32>,
    /// The longer queries, with the places of their first words.
    further: Vec<(u32, u32)>,
    /// Of each word how many queries begin before it.
    before: Vec<u32>,
    /// The queries of all texts, in no order and some more than once; then sorted; and where those of each text end.
    found: Vec<u32>,
    sorted: Vec<u32>,
    found_ends: Vec<usize>,
}

impl Index {
    /// Bytes of memory.
    pub(super) const fn bytes(&self) -> usize {
        self.word_places.bytes()
            + size_of_val(&*self.words)
            + self.long.len()
            + size_of_val(&*self.long_ends)
            + self.edge_places.bytes()
            + size_of_val(&*self.edges)
            + size_of_val(&*self.filter)
    }

    /// Calls `each` with the queries of each of some texts, ascending.
    ///
    /// Each step does one thing for all words, without a branch that depends on what stands there, and fetches what the next one needs
    /// into the near caches: so the processor waits for many places of the tables at once.
    pub(super) fn find(&self, folded: &Folded, steps: &mut Steps, mut each: impl FnMut(&[u32])) {
        vectorized(
            #[inline(always)]
            || self.look_up_words(folded, steps),
        );
        vectorized(
            #[inline(always)]
            || self.look_up_edges(steps),
        );
        vectorized(
            #[inline(always)]
            || gather(folded.ends(), steps),
        );
        let Steps { found, found_ends, sorted, .. } = steps;
        sort_each(found, found_ends, sorted);
        let mut start = 0;
        for end in found_ends {
            each(&sorted[start..*end]);
            start = *end;
        }
    }

    /// What is known of each word.
    #[inline(always)]
    fn look_up_words(&self, folded: &Folded, steps: &mut Steps) {
        let Steps { keys, numbers, words, others, .. } = steps;
        let (text, spans, table) = (folded.bytes(), folded.words(), &*self.words);
        words.clear();
        words.resize(spans.len(), Known::default());
        at_least(keys, spans.len());
        at_least(numbers, spans.len());
        at_least(others, spans.len());
        for ([start, end], to) in spans.iter().zip(&mut *keys) {
            let key = key_of(text, *start as usize, *end as usize);
            let hash = hash_key(key);
            self.word_places.prefetch(hash);
            *to = (key, hash);
        }
        for ((_, hash), number) in keys[..spans.len()].iter().zip(&mut *numbers) {
            *number = self.word_places.first(*hash);
            prefetch_index(table, *number as usize);
        }
        let mut n = 0;
        for (((word, number), (key, _)), i) in words.iter_mut().zip(&*numbers).zip(&*keys).zip(0..) {
            let Word { key: found, node, query } = table[*number as usize];
            *word = Known { node, query };
            others[n] = i;
            n += usize::from(((found != *key) & (*number != NOWHERE)) | (key[1] >= LONG));
        }
        for i in &others[..n] {
            let (i, [start, end]) = (*i as usize, spans[*i as usize]);
            let (key, hash) = keys[i];
            let Word { node, query, .. } = self.word(key, hash, &text[start as usize..end as usize]);
            words[i] = Known { node, query };
        }
        for end in folded.ends() {
            if let Some(last) = words[..*end].last_mut() {
                last.node |= LAST;
            }
        }
    }

    /// The queries of several words. Nothing but the flag [`LAST`] tells here where a text ends: a loop for each text would end where
    /// the processor does not expect it.
    #[inline(always)]
    fn look_up_edges(&self, steps: &mut Steps) {
        let Steps { words, numbers, others, pairs, twos, further, .. } = steps;
        let (filter, table) = (&*self.filter, &*self.edges);
        at_least(pairs, words.len());
        let mut n = 0;
        for (pair, i) in words.windows(2).zip(0..) {
            let hash = hash_edge(pair[0].node, pair[1].node);
            prefetch_index(filter, scale(hash, filter.len()));
            pairs[n] = (i, hash);
            n += usize::from(may_go_on(pair[0].node, pair[1].node));
        }
        let may = n;
        n = 0;
        for i in 0..may {
            let (_, hash) = pairs[i];
            self.edge_places.prefetch(hash);
            pairs[n] = pairs[i];
            n += usize::from(self.passes_filter(hash));
        }
        let pairs = &pairs[..n];
        at_least(numbers, n);
        for ((_, hash), number) in pairs.iter().zip(&mut *numbers) {
            *number = self.edge_places.first(*hash);
            prefetch_index(table, *number as usize);
        }
        twos.clear();
        twos.resize(words.len(), NO_QUERY);
        n = 0;
        for (((i, _), number), pair) in pairs.iter().zip(&*numbers).zip(0..) {
            let (edge, i) = (&table[*number as usize], *i as usize);
            let is_it = (edge.from == words[i].node) & (edge.next == plain(words[i + 1].node));
            twos[i] = if is_it { edge.query } else { NO_QUERY };
            others[n] = pair;
            n += usize::from((!is_it & (*number != NOWHERE)) | (edge.to & GOES_ON != 0));
        }
        further.clear();
        for pair in &others[..n] {
            let (i, hash) = pairs[*pair as usize];
            self.follow(&words[i as usize..], hash, numbers[*pair as usize], |query| further.push((i, query)));
        }
    }

    /// The queries that begin with the first two of some words.
    fn follow(&self, words: &[Known], hash: u64, number: u32, mut found: impl FnMut(u32)) {
        let mut edge = self.edges[number as usize];
        if edge.from != words[0].node || edge.next != plain(words[1].node) {
            edge = self.edge(words[0].node, words[1].node, hash);
            if edge.query != NO_QUERY {
                found(edge.query);
            }
        }
        for pair in words[1..].windows(2) {
            let hash = hash_edge(edge.to, pair[1].node);
            if pair[0].node & LAST != 0 || !may_go_on(edge.to, pair[1].node) || !self.passes_filter(hash) {
                return;
            }
            edge = self.edge(edge.to, pair[1].node, hash);
            if edge.query != NO_QUERY {
                found(edge.query);
            }
        }
    }

    /// Whether an entry is that of a word.
    #[inline(always)]
    fn is_word(&self, entry: &Word, key: Key, text: &[u8]) -> bool {
        if entry.key != key {
            return false;
        }
        let number = (entry.node & NUMBER) as usize;
        text.len() <= SHORT || &self.long[self.long_ends[number - 1] as usize..self.long_ends[number] as usize] == text
    }

    fn word(&self, key: Key, hash: u64, text: &[u8]) -> Word {
        let is_it = |number| self.is_word(&self.words[number as usize], key, text);
        self.words[self.word_places.find(hash, is_it) as usize]
    }

    /// Whether the hash may be that of an edge.
    #[inline(always)]
    fn passes_filter(&self, hash: u64) -> bool {
        let bits = filter_bits(hash);
        self.filter[scale(hash, self.filter.len())] & bits == bits
    }

    fn edge(&self, from: Node, to: Node, hash: u64) -> Edge {
        let is_it = |number| matches!(self.edges[number as usize], Edge { from: f, next: n, .. } if f == from && n == plain(to));
        self.edges[self.edge_places.find(hash, is_it) as usize]
    }
}

/// The queries of each text, in no order, some more than once.
#[inline(always)]
fn gather(ends: &[usize], steps: &mut Steps) {
    let Steps { words, twos, further, before, found, found_ends, .. } = steps;
    at_least(before, words.len() + 1);
    at_least(found, words.len() * 2 + further.len() + 1);
    let (mut start, mut n) = (0, 0);
    // All words up to the first of a longer query, then that query, and so on.
    for (end, query) in further.iter().map(|(i, query)| (*i as usize + 1, *query)).chain([(words.len(), NO_QUERY)]) {
        for ((word, two), before) in words[start..end].iter().zip(&twos[start..end]).zip(&mut before[start..end]) {
            *before = n as u32;
            found[n] = word.query;
            n += usize::from(word.query != NO_QUERY);
            found[n] = *two;
            n += usize::from(*two != NO_QUERY);
        }
        found[n] = query;
        n += usize::from(query != NO_QUERY);
        start = end;
    }
    before[start] = n as u32;
    found_ends.clear();
    found_ends.extend(ends.iter().map(|end| before[*end] as usize));
}

/// The queries before they are put into tables. Nodes have no flags but [`SEVERAL`] here.
#[derive(Default)]
pub(super) struct Builder {
    words: HashMap<Box<str>, Added>,
    edges: HashMap<(Node, Node), Added>,
    /// Bytes of all words.
    bytes: usize,
}

/// A word or an edge.
struct Added {
    node: Node,
    query: u32,
    /// How many queries it occurs in: the best guess at how common it is in texts.
    uses: u32,
    goes_on: bool,
}

impl Builder {
    /// Adds a query by its words; `None` if there is no room for more of them.
    pub(super) fn add<'a>(&mut self, words: impl Iterator<Item = &'a str>, query: u32) -> Option<()> {
        let mut words = words.peekable();
        let mut from = None;
        while let Some(text) = words.next() {
            let ends = words.peek().is_none();
            let word = match self.words.get_mut(text) {
                Some(known) => known,
                None => {
                    self.bytes += text.len();
                    u32::try_from(self.bytes).ok()?;
                    let node = u32::try_from(self.words.len() + 1).ok().filter(|n| *n < NUMBER)?;
                    self.words.entry(text.into()).or_insert(Added { node, query: NO_QUERY, uses: 0, goes_on: false })
                }
            };
            word.uses += 1;
            let node = word.node;
            let at = match from {
                None => word,
                Some(from) => {
                    let number = u32::try_from(self.edges.len() + 1).ok().filter(|n| *n < NUMBER)?;
                    let edge = match self.edges.entry((from, node)) {
                        hash_map::Entry::Occupied(known) => known.into_mut(),
                        hash_map::Entry::Vacant(free) => {
                            free.insert(Added { node: number | SEVERAL, query: NO_QUERY, uses: 0, goes_on: false })
                        }
                    };
                    edge.uses += 1;
                    edge
                }
            };
            at.goes_on |= !ends;
            if ends {
                at.query = query;
            }
            from = Some(at.node);
        }
        Some(())
    }

    pub(super) fn finish(self) -> Index {
        let mut added: Vec<(Box<str>, Added)> = self.words.into_iter().collect();
        added.sort_unstable_by_key(|(_, word)| (std::cmp::Reverse(word.uses), word.node));
        // The most used ones come first: they get the lowest numbers, and places in the buckets that their hashes name.
        let mut word_places = Places::new(added.len());
        let (mut words, mut long, mut long_ends) = (vec![NO_WORD, ANY_WORD], Vec::new(), vec![0, 0]);
        let mut word_nodes = vec![UNKNOWN; added.len() + 1];
        for (number, (text, word)) in (FIRST..).zip(added) {
            let text = text.as_bytes();
            let mut padded = text.to_vec();
            padded.resize(text.len() + SHORT, b' ');
            let key = key_of(&padded, 0, text.len());
            let node = number | if word.goes_on { GOES_ON } else { 0 };
            if text.len() > SHORT {
                long.extend_from_slice(text);
            }
            long_ends.push(long.len() as u32);
            word_nodes[word.node as usize] = node;
            words.push(Word { key, node, query: word.query });
            word_places.put(hash_key(key), number);
        }
        let mut added: Vec<((Node, Node), Added)> = self.edges.into_iter().collect();
        added.sort_unstable_by_key(|(_, edge)| (std::cmp::Reverse(edge.uses), edge.node));
        let mut edge_nodes = vec![UNKNOWN; added.len() + 1];
        for (number, (_, edge)) in (FIRST..).zip(&added) {
            edge_nodes[(edge.node & !SEVERAL) as usize] = number | SEVERAL | if edge.goes_on { GOES_ON } else { 0 };
        }
        // The filter has twelve bits for each.
        let mut edge_places = Places::new(added.len());
        let mut filter = vec![0_u64; added.len() * 12 / 64 + 1].into_boxed_slice();
        let mut edges = vec![NO_EDGE; 2];
        for (number, ((from, following), edge)) in (FIRST..).zip(added) {
            let from = if from & SEVERAL == 0 { word_nodes[from as usize] } else { edge_nodes[(from & !SEVERAL) as usize] };
            let (next, to) = (plain(word_nodes[following as usize]), edge_nodes[(edge.node & !SEVERAL) as usize]);
            let hash = hash_edge(from, next);
            filter[scale(hash, filter.len())] |= filter_bits(hash);
            edge_places.put(hash, number);
            edges.push(Edge { from, next, to, query: edge.query });
        }
        Index {
            word_places,
            words: words.into(),
            long: long.into(),
            long_ends: long_ends.into(),
            edge_places,
            edges: edges.into(),
            filter,
        }
    }
}

/// The key of the word `text[start..end]`, on whose beginning follow [`SHORT`] bytes.
#[inline(always)]
fn key_of(text: &[u8], start: usize, end: usize) -> Key {
    let bytes = end - start;
    match text[start..].first_chunk() {
        Some(first) if bytes <= SHORT => {
            let key = u128::from_le_bytes(*first) & (u128::MAX >> (8 * (SHORT - bytes)));
            [key as u64, (key >> 64) as u64]
        }
        _ => hash_long(&text[start..end]),
    }
}

/// The key of a long word.
fn hash_long(word: &[u8]) -> Key {
    let (whole, rest) = word.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let hash = whole.iter().fold(0, |hash, eight| mix(hash ^ u64::from_le_bytes(*eight), ODD));
    [mix(hash ^ u64::from_le_bytes(last), ODD), word.len() as u64 | LONG]
}

const fn hash_key(key: Key) -> u64 {
    mix(key[0], key[1] ^ ODD)
}

const fn hash_edge(from: Node, to: Node) -> u64 {
    mix((from as u64) << 32 | plain(to) as u64, ODD)
}

const ODD: u64 = 0xd6e8_feb8_6659_fd93;

/// Spreads two numbers over all bits: both halves of a product of twice the width.
const fn mix(a: u64, b: u64) -> u64 {
    let product = (a ^ 0x9e37_79b9_7f4a_7c15) as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

/// Two bits by the lowest twelve of a hash.
const fn filter_bits(hash: u64) -> u64 {
    1 << (hash & 63) | 1 << (hash >> 6 & 63)
}

/// Whether some query may go on from `from` with `next`; if not, none does.
const fn may_go_on(from: Node, next: Node) -> bool {
    (from & (GOES_ON | LAST) == GOES_ON) & (next & NUMBER != UNKNOWN)
}

/// A word without flags, as an edge leads to it from the one before.
const fn plain(word: Node) -> Node {
    word & NUMBER
}
