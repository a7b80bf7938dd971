//! Special tokens of a vocabulary made by [`train_wordpiece`](crate::tokenizer::train_wordpiece); they take the first ids, in this order.

/// Their texts.
pub const TOKENS: [&str; 7] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"];
/// Padding.
pub const PAD_ID: u32 = 0;
/// End of text.
pub const SEP_ID: u32 = 3;
/// Start of a generated text.
pub const DEC_ID: u32 = 5;
/// Start of a text for the image-grounded encoder.
pub const ENC_ID: u32 = 6;
