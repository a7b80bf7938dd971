//! How the captions of one image grow from step to step: draws, the likeliest token, or beams.

use crate::error::{ModelError, Result};
use crate::logits::{best, likeliest, log_softmax};
use crate::random::Stream;
use crate::sampling::{Sampling, Strategy};

/// A text and what it is worth.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Hypothesis {
    /// Tokens, prompt first, and the end token unless the text was cut.
    pub(crate) ids: Vec<u32>,
    /// For beams: log-probability of what follows the prompt, after the repetition penalty, divided by its length to the power of the
    /// length penalty.
    pub(crate) score: Option<f32>,
}

/// The captions of one image under way.
///
/// Before its first step a search has one row, the prompt; from then on one for each caption or beam.
pub(crate) struct Search<'a> {
    sampling: &'a Sampling,
    /// The token that ends a text.
    end: u32,
    prompt: usize,
    texts: Texts,
}

enum Texts {
    /// Each row is a text of its own; the streams are their randomness, none for greedy ones.
    Independent { texts: Vec<Text>, streams: Vec<Stream> },
    /// Rows compete.
    Beams(Beams),
}

struct Text {
    ids: Vec<u32>,
    done: bool,
}

impl<'a> Search<'a> {
    /// A search from `prompt`. Draws are keyed by seed, the image's key, the number of the caption and the position in it.
    pub(crate) fn new(sampling: &'a Sampling, prompt: &[u32], end: u32, seed: u64, key: &str) -> Self {
        let start = || Text { ids: prompt.to_vec(), done: false };
        let stream = |number: u64| Stream::new("caption", seed, &[key.as_bytes(), &number.to_le_bytes()]);
        let texts = match sampling.strategy {
            Strategy::Nucleus => Texts::Independent {
                texts: (0..sampling.captions).map(|_| start()).collect(),
                streams: (0..sampling.captions as u64).map(stream).collect(),
            },
            Strategy::Greedy => Texts::Independent { texts: vec![start()], streams: Vec::new() },
            Strategy::Beam => Texts::Beams(Beams {
                running: vec![Beam { ids: prompt.to_vec(), score: 0.0, parent: 0 }],
                finished: Vec::new(),
                done: false,
            }),
        };
        Self { sampling, end, prompt: prompt.len(), texts }
    }

    /// Whether no text can change any more.
    pub(crate) fn is_done(&self) -> bool {
        match &self.texts {
            Texts::Independent { texts, .. } => texts.iter().all(|text| text.done),
            Texts::Beams(beams) => beams.done,
        }
    }

    /// For each row of the next step: the row of this step that it goes on from, and its newest token.
    pub(crate) fn next(&self) -> Vec<(usize, u32)> {
        let newest = |ids: &[u32]| ids.last().copied().unwrap_or(self.end);
        match &self.texts {
            Texts::Independent { texts, .. } => texts.iter().enumerate().map(|(row, text)| (row, newest(&text.ids))).collect(),
            Texts::Beams(beams) => beams.running.iter().map(|beam| (beam.parent, newest(&beam.ids))).collect(),
        }
    }

    /// Takes the logits of this step's rows, `(rows, vocab)` in one slice, which are used up. In the first step there is one row, whose
    /// logits are those of all texts.
    ///
    /// # Errors
    /// No logit of a row is a finite number.
    pub(crate) fn step(&mut self, logits: &mut [f32], vocab: usize) -> Result<()> {
        let Self { sampling, end, prompt, texts } = self;
        match texts {
            Texts::Beams(beams) => beams.step(logits, vocab, sampling, *end, *prompt),
            Texts::Independent { texts, streams } => {
                let shared = texts.len() > 1 && logits.len() == vocab;
                for (row, text) in texts.iter_mut().enumerate().filter(|(_, text)| !text.done) {
                    let id = if let Some(stream) = streams.get_mut(row) {
                        let uniform = stream.uniform_at(text.ids.len() as u64);
                        match shared {
                            true => sampling.draw(&mut logits.to_vec(), &text.ids, *end, uniform)?,
                            false => sampling.draw(&mut logits[row * vocab..][..vocab], &text.ids, *end, uniform)?,
                        }
                    } else {
                        sampling.process(logits, &text.ids, *end);
                        likeliest(logits)?.0
                    };
                    text.ids.push(id);
                    text.done = id == *end || text.ids.len() >= sampling.max_length;
                }
                Ok(())
            }
        }
    }

    /// The texts: as many as captions are wanted, for beams the best first.
    pub(crate) fn finish(self) -> Vec<Hypothesis> {
        match self.texts {
            Texts::Independent { texts, .. } => texts.into_iter().map(|text| Hypothesis { ids: text.ids, score: None }).collect(),
            Texts::Beams(mut beams) => {
                beams.finished.truncate(self.sampling.captions);
                beams.finished.into_iter().map(|(score, ids)| Hypothesis { ids, score: Some(score) }).collect()
            }
        }
    }
}

/// Beam search as Hugging Face's `generate` does it since version 4.50 (`_beam_search` of `generation/utils.py`) with
/// `early_stopping=False`: scores are sums of log-probabilities after the repetition penalty, and a finished text is compared by its
/// score divided by (tokens after the prompt, the end included) to the power of the length penalty. The search is over when as many
/// texts are finished as there are beams, and the best that is under way would, ended at its present length, be no better than the
/// worst of them.
struct Beams {
    /// Under way, best first.
    running: Vec<Beam>,
    /// Finished, best first, at most as many as beams.
    finished: Vec<(f32, Vec<u32>)>,
    done: bool,
}

struct Beam {
    ids: Vec<u32>,
    score: f32,
    parent: usize,
}

impl Beams {
    fn step(&mut self, logits: &mut [f32], vocab: usize, sampling: &Sampling, end: u32, prompt: usize) -> Result<()> {
        let beams = sampling.beams();
        // Twice as many as go on, for as many may end here as there are beams.
        let mut candidates: Vec<(f32, usize, u32)> = Vec::with_capacity(2 * beams * self.running.len());
        for (row, (logits, beam)) in logits.chunks_exact_mut(vocab).zip(&self.running).enumerate() {
            log_softmax(logits)?;
            sampling.process(logits, &beam.ids, end);
            candidates.extend(best(logits, 2 * beams).into_iter().map(|(id, score)| (score + beam.score, row, id)));
        }
        candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        candidates.truncate(2 * beams);

        let length = self.running.first().map_or(0, |beam| beam.ids.len()) + 1;
        let share = ((length - prompt) as f64).powf(sampling.length_exponent()) as f32;
        let cut = length >= sampling.max_length;
        let mut running = Vec::with_capacity(beams);
        for (rank, (score, parent, id)) in candidates.into_iter().enumerate() {
            let mut ids = Vec::with_capacity(sampling.max_length);
            ids.extend_from_slice(&self.running[parent].ids);
            ids.push(id);
            if !cut && id != end {
                if running.len() < beams {
                    running.push(Beam { ids, score, parent });
                }
            } else if rank < beams {
                // Of equal ones the earlier stays before the later.
                let score = score / share;
                let place = self.finished.partition_point(|(other, _)| *other >= score);
                self.finished.insert(place, (score, ids));
            }
        }
        if !cut && running.len() < beams {
            let what = format!("too few tokens have a finite score for {beams} beams; are the model's weights sound?");
            return Err(ModelError::Input(what));
        }
        self.finished.truncate(beams);
        self.running = running;
        self.done = match (self.running.first(), self.finished.get(beams - 1)) {
            (Some(best), Some((worst, _))) => best.score / share <= *worst,
            (running, _) => running.is_none(),
        };
        Ok(())
    }
}
