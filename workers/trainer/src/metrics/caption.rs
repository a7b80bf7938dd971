//! One caption to judge and what it is judged against.

use crate::TrainerError;

/// A candidate caption and its references, tokenised: tokens are separated by single spaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionCase {
    candidate: String,
    references: Vec<String>,
}

impl CaptionCase {
    /// A case from texts that are already tokenised.
    ///
    /// # Errors
    ///
    /// [`TrainerError::NoReferences`] when there is no reference, since every caption metric divides by their number.
    pub fn from_tokenized(candidate: String, references: Vec<String>) -> Result<Self, TrainerError> {
        if references.is_empty() {
            return Err(TrainerError::NoReferences { candidate });
        }
        Ok(Self { candidate, references })
    }

    /// A case from plain texts, tokenised by [`tokenize`].
    ///
    /// # Errors
    ///
    /// As [`CaptionCase::from_tokenized`].
    pub fn from_text<S: AsRef<str>>(candidate: &str, references: &[S]) -> Result<Self, TrainerError> {
        let references = references.iter().map(|text| tokenize(text.as_ref())).collect();
        Self::from_tokenized(tokenize(candidate), references)
    }

    /// The tokens of the candidate.
    pub(super) fn candidate_tokens(&self) -> Vec<&str> {
        self.candidate.split_whitespace().collect()
    }

    /// The tokens of every reference.
    pub(super) fn reference_tokens(&self) -> Vec<Vec<&str>> {
        self.references.iter().map(|text| text.split_whitespace().collect()).collect()
    }
}

/// Lower-cases and keeps runs of letters and digits (apostrophes inside a word stay), joined by single spaces.
///
/// The reference scores run the Penn Treebank tokenizer and drop punctuation; on the short captions of this trade the two differ
/// only in clitics ("isn't" stays one token here).
pub fn tokenize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split(|c: char| !(c.is_alphanumeric() || c == '\'' || c == '\u{2019}')) {
        let word = word.trim_matches(['\'', '\u{2019}']);
        if word.is_empty() {
            continue;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        out.extend(word.chars().flat_map(char::to_lowercase));
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn punctuation_and_case_go_and_apostrophes_inside_words_stay() {
        assert_eq!(tokenize("A man's dog, isn't it?  (3.5 kg)"), "a man's dog isn't it 3 5 kg");
        assert_eq!(tokenize("  'Quoted' -- text! "), "quoted text");
        assert_eq!(tokenize("..."), "");
    }

    #[test]
    fn a_case_without_references_is_refused() {
        let error = CaptionCase::from_text::<&str>("a cat", &[]).unwrap_err();
        assert!(matches!(error, TrainerError::NoReferences { ref candidate } if candidate == "a cat"));
    }
}
