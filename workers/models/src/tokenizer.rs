//! Texts for BERT: cleaning, `WordPiece` ids, decoding, and the training of a small vocabulary.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainerBuilder};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer, Trainer,
};

use crate::config::TextConfig;
use crate::error::{ModelError, Result};
use crate::files::read_text;
use crate::special;

/// Words that a cleaned caption keeps at most (`max_words` of BLIP's `pre_caption`).
pub const MAX_WORDS: usize = 50;

/// Characters that cleaning takes out.
const PUNCTUATION: &str = ".!\"()*#:;~";

/// A caption as BLIP's models were trained on it (`pre_caption` of `data/utils.py`): lower case, the characters
/// `. ! " ( ) * # : ; ~` and every run of white space become one space, at most `max_words` words.
#[must_use]
pub fn clean_caption(text: &str, max_words: usize) -> String {
    let lower = text.to_lowercase();
    let mut clean = String::with_capacity(lower.len());
    let words = lower.split(|c: char| c.is_whitespace() || PUNCTUATION.contains(c)).filter(|word| !word.is_empty());
    for (i, word) in words.take(max_words).enumerate() {
        if i > 0 {
            clean.push(' ');
        }
        clean.push_str(word);
    }
    clean
}

/// A question as BLIP's models were trained on it (`pre_question` of `data/utils.py`): lower case, without the characters
/// `. ! " ( ) * # : ; ~`, at most `max_words` words.
#[must_use]
pub fn clean_question(text: &str, max_words: usize) -> String {
    let lower: String = text.to_lowercase().chars().filter(|c| !PUNCTUATION.contains(*c)).collect();
    lower.split_whitespace().take(max_words).collect::<Vec<_>>().join(" ")
}

/// The token that opens a text and so tells the model its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstToken {
    /// `[CLS]`: the text encoder.
    Cls,
    /// `[ENC]`: the image-grounded encoder.
    Enc,
    /// `[DEC]`: the decoder.
    Dec,
}

/// Token ids of several texts, padded on the right to one width, with a mask that is 1 for tokens and 0 for padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextBatch {
    /// Ids, row by row.
    pub ids: Vec<u32>,
    /// Mask, row by row.
    pub mask: Vec<u32>,
    /// Tokens per row.
    pub width: usize,
}

impl TextBatch {
    /// Pads rows of ids to the longest of them, or to `width` if that is more.
    #[must_use]
    pub fn pad<R: AsRef<[u32]>>(rows: &[R], width: usize, pad: u32) -> Self {
        let longest = rows.iter().map(|row| row.as_ref().len()).max();
        let width = longest.unwrap_or(0).max(width);
        let mut batch = Self { ids: Vec::with_capacity(rows.len() * width), mask: Vec::with_capacity(rows.len() * width), width };
        for row in rows.iter().map(AsRef::as_ref) {
            batch.ids.extend_from_slice(row);
            batch.mask.extend(row.iter().map(|_| 1));
            let end = batch.ids.len() + width - row.len();
            batch.ids.resize(end, pad);
            batch.mask.resize(end, 0);
        }
        batch
    }

    /// Ids and mask as u32 tensors `(rows, width)`.
    ///
    /// # Errors
    /// The device has no memory.
    pub fn tensors(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let shape = (self.ids.len() / self.width.max(1), self.width);
        Ok((Tensor::from_slice(&self.ids, shape, device)?, Tensor::from_slice(&self.mask, shape, device)?))
    }
}

/// A `tokenizer.json` with the special ids of a model.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    json: String,
    cls: u32,
    sep: u32,
    pad: u32,
    dec: u32,
    enc: u32,
}

impl TextTokenizer {
    /// Reads `tokenizer.json` of a checkpoint directory, or, where there is none, BERT's `vocab.txt`, for a model with this text config.
    ///
    /// `[DEC]`, `[SEP]` and padding are what the config says. `[ENC]` is what the config says, else the tokenizer's, else the id after
    /// `[DEC]` (BLIP's own tokenizer adds both in this order; the published `tokenizer.json` files have neither).
    ///
    /// # Errors
    /// The file cannot be read or parsed, has ids outside the vocabulary of the model, or disagrees with the config about a special
    /// token.
    pub fn from_dir(dir: &Path, config: &TextConfig) -> Result<Self> {
        let (path, vocab) = (file(dir), dir.join("vocab.txt"));
        if path.exists() || !vocab.exists() {
            return Self::from_json(read_text(&path)?, config, &path);
        }
        let settings = dir.join("tokenizer_config.json");
        let lowercase = match settings.exists() {
            true => {
                let value: Value = serde_json::from_str(&read_text(&settings)?)
                    .map_err(|source| ModelError::Json { path: settings.clone(), source })?;
                value["do_lower_case"].as_bool().unwrap_or(true)
            }
            false => true,
        };
        Self::from_json(json_from_vocab(&read_text(&vocab)?, lowercase), config, &vocab)
    }

    /// A tokenizer from the text of a `tokenizer.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_json(json: String, config: &TextConfig, path: &Path) -> Result<Self> {
        let fail = |what: String, source| ModelError::Tokenizer { what, source };
        let mut inner =
            Tokenizer::from_bytes(json.as_bytes()).map_err(|e| fail(format!("{} does not parse", path.display()), Some(e)))?;
        // Lengths are this crate's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| fail("cannot switch truncation off".to_owned(), Some(e)))?;
        let size = inner.get_vocab_size(true);
        if size > config.vocab_size {
            return Err(fail(format!("{} has {size} tokens, the model only {}", path.display(), config.vocab_size), None));
        }
        for (text, id) in [("[SEP]", config.sep_token_id), ("[PAD]", config.pad_token_id), ("[DEC]", config.bos_token_id)] {
            if let Some(found) = inner.token_to_id(text)
                && found != id
            {
                return Err(fail(format!("{} gives {text} the id {found}, config.json says {id}", path.display()), None));
            }
        }
        let cls = inner.token_to_id("[CLS]").ok_or_else(|| fail(format!("{} has no token [CLS]", path.display()), None))?;
        let enc = config.enc_token_id.or_else(|| inner.token_to_id("[ENC]")).unwrap_or(config.bos_token_id + 1);
        Ok(Self { inner, json, cls, sep: config.sep_token_id, pad: config.pad_token_id, dec: config.bos_token_id, enc })
    }

    /// The text of the `tokenizer.json`.
    #[must_use]
    pub fn json(&self) -> &str {
        &self.json
    }

    /// The id of a first token.
    #[must_use]
    pub fn first_id(&self, first: FirstToken) -> u32 {
        match first {
            FirstToken::Cls => self.cls,
            FirstToken::Enc => self.enc,
            FirstToken::Dec => self.dec,
        }
    }

    /// The token with this id.
    pub(crate) fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id that ends a text.
    #[must_use]
    pub fn sep_id(&self) -> u32 {
        self.sep
    }

    /// The id of padding.
    #[must_use]
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// Ids of a text: `first`, its pieces, `[SEP]`; pieces beyond `max_len` tokens in all are cut off before `[SEP]`.
    ///
    /// # Errors
    /// `max_len` is below 2, or the tokenizer library fails.
    pub fn encode(&self, text: &str, first: FirstToken, max_len: usize) -> Result<Vec<u32>> {
        if max_len < 2 {
            return Err(ModelError::Input(format!("a text of {max_len} tokens has no room for its first and last token")));
        }
        let mut ids = vec![self.first_id(first)];
        ids.extend(self.pieces(text)?);
        ids.truncate(max_len - 1);
        ids.push(self.sep);
        Ok(ids)
    }

    /// The ids that generation starts from: `[DEC]` and the pieces of the prompt, without an end.
    ///
    /// # Errors
    /// The tokenizer library fails.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = vec![self.dec];
        ids.extend(self.pieces(prompt)?);
        Ok(ids)
    }

    /// The text of ids, without special tokens.
    ///
    /// # Errors
    /// The tokenizer library fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| ModelError::Tokenizer { what: "cannot decode".to_owned(), source: Some(e) })
    }

    fn pieces(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| ModelError::Tokenizer { what: format!("cannot split {text:?}"), source: Some(e) })?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// The text of BERT's `tokenizer.json` from that of its `vocab.txt` (a token a line; the id is the line's number).
#[must_use]
pub fn json_from_vocab(vocab: &str, lowercase: bool) -> String {
    let ids: serde_json::Map<String, Value> = vocab.lines().zip(0..).map(|(token, id)| (token.to_owned(), json!(id))).collect();
    let added: Vec<Value> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .iter()
        .filter_map(|token| Some((token, ids.get(*token)?)))
        .map(|(token, id)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                       "lowercase": lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": ids},
    })
    .to_string()
}

/// Trains a lower-case BERT `WordPiece` vocabulary of at most `vocab_size` tokens on captions and returns the text of its
/// `tokenizer.json`. The special tokens of [`special`] come first.
///
/// The result depends on the captions alone, as a set with counts: not on their order, not on threads.
///
/// # Errors
/// The captions have more different characters than `vocab_size` has room for, or the tokenizer library fails.
pub fn train_wordpiece<S: AsRef<str>>(captions: &[S], vocab_size: usize) -> Result<String> {
    train(captions, vocab_size).map_err(|source| ModelError::Tokenizer {
        what: format!("cannot train a vocabulary of {vocab_size} tokens"),
        source: Some(source),
    })
}

fn train<S: AsRef<str>>(captions: &[S], vocab_size: usize) -> tokenizers::Result<String> {
    let normalizer = BertNormalizer::default();
    let mut words = Vec::new();
    for caption in captions {
        words.extend(split_words(&normalizer, caption.as_ref())?);
    }
    let characters: BTreeSet<char> = words.iter().flat_map(|word| word.chars()).collect();

    // The trainer numbers word-inner characters in the order of a randomly seeded hash table, and breaks ties between merges by
    // number. Naming every character first, in order, makes the vocabulary a function of the captions.
    let named = special::TOKENS
        .iter()
        .map(|token| (*token).to_owned())
        .chain(characters.iter().map(char::to_string))
        .chain(characters.iter().map(|c| format!("##{c}")));
    let named: Vec<AddedToken> = named.map(|token| AddedToken::from(token, true)).collect();
    if named.len() > vocab_size {
        return Err(format!("{} special tokens and single characters do not fit", named.len()).into());
    }
    let mut trainer =
        WordPieceTrainerBuilder::new().vocab_size(vocab_size).special_tokens(named).min_frequency(2).show_progress(false).build();
    trainer.feed(words.iter(), |word| Ok(vec![word.to_owned()]))?;
    let mut model = WordPiece::default();
    trainer.train(&mut model)?;

    let mut tokenizer = Tokenizer::new(model);
    let id = |text: &str| (text.to_owned(), tokenizer.token_to_id(text).unwrap_or(0));
    let template = BertProcessing::new(id("[SEP]"), id("[CLS]"));
    tokenizer.with_normalizer(Some(normalizer))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(WordPieceDecoder::default()));
    tokenizer.with_post_processor(Some(template));
    tokenizer.add_special_tokens(special::TOKENS.map(|token| AddedToken::from(token, true)))?;
    tokenizer.to_string(true)
}

/// The words that BERT's normaliser and pre-tokeniser make of a text.
fn split_words(normalizer: &BertNormalizer, text: &str) -> tokenizers::Result<Vec<String>> {
    let mut normalized = NormalizedString::from(text);
    normalizer.normalize(&mut normalized)?;
    let mut split = PreTokenizedString::from(normalized);
    BertPreTokenizer.pre_tokenize(&mut split)?;
    Ok(split.get_splits(OffsetReferential::Normalized, OffsetType::Byte).into_iter().map(|(word, ..)| word.to_owned()).collect())
}

/// The tokenizer of any BERT, as it is.
///
/// # Errors
/// The folder has neither a `tokenizer.json` nor a `vocab.txt`, or it does not parse.
pub(crate) fn of_folder(dir: &Path) -> Result<Tokenizer> {
    let path = file(dir);
    let json = match path.exists() {
        true => read_text(&path)?,
        false => json_from_vocab(&read_text(&dir.join("vocab.txt"))?, true),
    };
    let parsed = Tokenizer::from_bytes(json.as_bytes());
    let what = || format!("the vocabulary in {} does not parse", dir.display());
    parsed.map_err(|source| ModelError::Tokenizer { what: what(), source: Some(source) })
}

/// The path under which [`TextTokenizer::from_dir`] looks.
#[must_use]
pub(crate) fn file(dir: &Path) -> PathBuf {
    dir.join("tokenizer.json")
}
