//! Texts for CLIP: byte-pair ids with a first and a last token.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer, Trainer,
};

use super::ClipFamily;
use crate::error::{ModelError, Result};
use crate::files::read_text;

/// What opens and ends a text in CLIP's vocabulary.
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What ends the last piece of a word.
const END_OF_WORD: &str = "</w>";

/// Words of CLIP's tokenizer: contractions, runs of letters, single digits, runs of anything else (OpenAI's `simple_tokenizer.py`).
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A tokenizer with CLIP's rules of length.
#[derive(Debug, Clone)]
pub struct ClipTokenizer {
    inner: Tokenizer,
    pad: u32,
    /// SigLIP was trained on texts that fill the context.
    fills_context: bool,
}

impl ClipTokenizer {
    /// Reads `tokenizer.json` of a checkpoint directory, or, where there is none, `vocab.json` and `merges.txt`. Padding is the `pad_token`
    /// of `tokenizer_config.json`, or else what ends a text.
    ///
    /// # Errors
    /// The files cannot be read or parsed, or the tokenizer puts nothing at the end of a text.
    pub fn from_dir(dir: &Path, family: ClipFamily) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let merges = dir.join("merges.txt");
        let text = match !path.exists() && merges.exists() {
            true => Self::json_from_merges(&read_text(&dir.join("vocab.json"))?, &read_text(&merges)?, &dir.join("vocab.json"))?,
            false => read_text(&path)?,
        };
        let settings = dir.join("tokenizer_config.json");
        let pad = match settings.exists() {
            true => {
                let value: Value = serde_json::from_str(&read_text(&settings)?)
                    .map_err(|source| ModelError::Json { path: settings.clone(), source })?;
                let token = &value["pad_token"];
                token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
            }
            false => None,
        };
        Self::from_json(&text, pad.as_deref(), family, &path)
    }

    /// A tokenizer from the text of a `tokenizer.json` and the token that pads; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_json(json: &str, pad_token: Option<&str>, family: ClipFamily, path: &Path) -> Result<Self> {
        let fail = |what: String, source| ModelError::Tokenizer { what, source };
        let mut inner =
            Tokenizer::from_bytes(json.as_bytes()).map_err(|e| fail(format!("{} does not parse", path.display()), Some(e)))?;
        // Lengths are this crate's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| fail("cannot switch truncation off".to_owned(), Some(e)))?;
        let empty = inner.encode_fast("", true).map_err(|e| fail("cannot split an empty text".to_owned(), Some(e)))?;
        let Some(&end) = empty.get_ids().last() else {
            return Err(fail(format!("{} puts nothing at the end of a text, which CLIP reads", path.display()), None));
        };
        let pad = pad_token.and_then(|token| inner.token_to_id(token)).unwrap_or(end);
        Ok(Self { inner, pad, fills_context: family == ClipFamily::Siglip })
    }

    /// The text of CLIP's `tokenizer.json` from those of `vocab.json` (token to id) and `merges.txt` (a version line, then a pair a line);
    /// `path` is for messages.
    ///
    /// # Errors
    /// The vocabulary does not parse, or lacks CLIP's first and last token.
    pub fn json_from_merges(vocab: &str, merges: &str, path: &Path) -> Result<String> {
        let vocab: Value = serde_json::from_str(vocab).map_err(|source| ModelError::Json { path: path.to_owned(), source })?;
        let id = |token: &str| {
            let missing = || ModelError::Tokenizer { what: format!("{} has no token {token}", path.display()), source: None };
            vocab[token].as_u64().ok_or_else(missing)
        };
        let (start, end) = (id(START)?, id(END)?);
        let merges: Vec<&str> = merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty()).collect();
        let added = |id: u64, token: &str| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(start, START), added(end, END)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            ]},
            "post_processor": {"type": "RobertaProcessing", "sep": [END, end], "cls": [START, start],
                               "trim_offsets": false, "add_prefix_space": false},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": END, "continuing_subword_prefix": "",
                      "end_of_word_suffix": END_OF_WORD, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                      "vocab": vocab, "merges": merges},
        });
        Ok(tokenizer.to_string())
    }

    /// A vocabulary of at most `vocab_size` tokens by CLIP's rules, learnt from texts: the text of a `tokenizer.json`. Same texts, in any
    /// order, same vocabulary.
    ///
    /// # Errors
    /// `vocab_size` is too small for single bytes, or the tokenizer library fails.
    pub fn train(texts: &[String], vocab_size: usize) -> Result<String> {
        let fail = |what: &str, source| ModelError::Tokenizer { what: what.to_owned(), source };
        // The rules without a vocabulary are those of one that holds nothing but the first and the last token.
        let none = json!({START: 0, END: 1}).to_string();
        let rules = Self::json_from_merges(&none, "", Path::new("vocab.json"))?;
        let rules = Tokenizer::from_bytes(rules.as_bytes()).map_err(|e| fail("the rules do not parse", Some(e)))?;
        // As in CLIP's own vocabulary the bytes come first, within words and at their ends. The trainer would number them in the order of a
        // randomly seeded hash table, and breaks ties between merges by number.
        let bytes: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
        let inside = bytes.iter().map(char::to_string);
        let named = inside.chain(bytes.iter().map(|byte| format!("{byte}{END_OF_WORD}")));
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size.saturating_sub(2))
            .special_tokens(named.map(|token| AddedToken::from(token, true)).collect())
            .min_frequency(2)
            .end_of_word_suffix(END_OF_WORD.to_owned())
            .show_progress(false)
            .build();
        let words = |text: &str| -> tokenizers::Result<Vec<String>> {
            let mut normal = NormalizedString::from(text);
            if let Some(normalizer) = rules.get_normalizer() {
                normalizer.normalize(&mut normal)?;
            }
            let mut split = PreTokenizedString::from(normal);
            if let Some(splitter) = rules.get_pre_tokenizer() {
                splitter.pre_tokenize(&mut split)?;
            }
            let pieces = split.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
            Ok(pieces.into_iter().map(|(word, ..)| word.to_owned()).collect())
        };
        trainer.feed(texts.iter(), |text| words(text)).map_err(|e| fail("texts cannot be split into words", Some(e)))?;
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(|e| fail("no vocabulary can be learnt", Some(e)))?;
        let learnt = serde_json::to_value(&model).map_err(|e| fail(&format!("the vocabulary cannot be written: {e}"), None))?;
        // First and last token come last, as in CLIP's own vocabulary, so that the end has the highest id.
        let Some(mut vocab) = learnt["vocab"].as_object().cloned() else {
            return Err(fail("the vocabulary is empty", None));
        };
        let size = vocab.len();
        if size + 2 > vocab_size {
            return Err(fail(&format!("{vocab_size} tokens are too few: single bytes alone are {}", size + 2), None));
        }
        vocab.insert(START.to_owned(), size.into());
        vocab.insert(END.to_owned(), (size + 1).into());
        let merges: Vec<String> = learnt["merges"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|pair| Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)))
            .collect();
        Self::json_from_merges(&Value::Object(vocab).to_string(), &merges.join("\n"), Path::new("vocab.json"))
    }

    /// The text of its `tokenizer.json`.
    ///
    /// # Errors
    /// The tokenizer library fails.
    pub fn json(&self) -> Result<String> {
        self.inner
            .to_string(false)
            .map_err(|e| ModelError::Tokenizer { what: "the tokenizer cannot be written".to_owned(), source: Some(e) })
    }

    /// Number of tokens.
    #[must_use]
    pub fn size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of padding.
    #[must_use]
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// Ids of a text with its first and last token. A text of more than `max_len` tokens is cut before its last one; SigLIP's are padded
    /// to `max_len`.
    ///
    /// # Errors
    /// `max_len` is below 2, or the tokenizer library fails.
    pub fn encode(&self, text: &str, max_len: usize) -> Result<Vec<u32>> {
        if max_len < 2 {
            return Err(ModelError::Input(format!("a text of {max_len} tokens has no room for its first and last token")));
        }
        let encoding = self
            .inner
            .encode_fast(text, true)
            .map_err(|e| ModelError::Tokenizer { what: format!("cannot split {text:?}"), source: Some(e) })?;
        let mut ids = encoding.get_ids().to_vec();
        if ids.len() > max_len {
            ids.drain(max_len - 1..ids.len() - 1);
        }
        if self.fills_context {
            ids.resize(max_len, self.pad);
        }
        Ok(ids)
    }
}
