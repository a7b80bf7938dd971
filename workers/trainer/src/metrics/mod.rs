//! Evaluation metrics, equal to the reference implementations on the same tokens and scores.
//!
//! Captions: BLEU, CIDEr-D and ROUGE-L as `pycocoevalcap` 1.2 computes them. Retrieval: recall at k in both directions. Filters:
//! area under the ROC curve, precision and recall. Everything here is plain arithmetic: no model, no I/O, and the same numbers
//! whatever the order of threads, because every sum runs in a fixed order.

mod bleu;
mod caption;
mod cider;
mod classification;
mod ngrams;
mod retrieval;
mod rouge;

pub use bleu::{BleuCounts, bleu, bleu_counts};
pub use caption::{CaptionCase, tokenize};
pub use cider::cider_d;
pub use classification::{Confusion, auroc};
pub use retrieval::{Ranks, Recall, Relevance, ranks, recall};
pub use rouge::rouge_l;
