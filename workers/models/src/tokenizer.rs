//! BERT WordPiece texts: cleaning, ids, and training a small vocabulary.

/// Special tokens of a vocabulary made by this crate; they take the first ids.
pub mod special {
    /// Padding.
    pub const PAD_ID: u32 = 0;
    /// End of text, `[SEP]`.
    pub const SEP_ID: u32 = 3;
    /// Start of a generated text, `[DEC]`.
    pub const DEC_ID: u32 = 5;
    /// Start of a text for the image-grounded encoder, `[ENC]`.
    pub const ENC_ID: u32 = 6;
}
