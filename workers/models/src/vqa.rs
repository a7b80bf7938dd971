//! Visual question answering with BLIP (arXiv 2201.12086, section 4.4): the question is encoded with the image in view, and a decoder that
//! sees the states of the question writes the answer. Weights lie as in Hugging Face's `BlipForQuestionAnswering`.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use crate::config::{MedConfig, TextConfig};
use crate::error::{ModelError, Result};
use crate::med::Decoder;
use crate::preprocess::Pixels;
use crate::text::{CrossCache, TextModel, causal_mask, padding_mask};
use crate::tokenizer::{FirstToken, MAX_WORDS, TextTokenizer, clean_question};
use crate::vision::{VisionFamily, VisionModel};

/// A BLIP for visual question answering, with its weights on a device.
#[derive(Debug, Clone)]
pub struct Vqa {
    config: MedConfig,
    device: Device,
    dtype: DType,
    vision: VisionModel,
    questions: TextModel,
    decoder: Decoder,
}

impl Vqa {
    /// Builds the model from a source of tensors.
    ///
    /// # Errors
    /// The config is unusable, or a tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(config: &MedConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let config = config.clone().checked()?;
        let text = &config.text_config;
        // The decoder's cross-attention reads the question, not the image.
        let answers = TextConfig { encoder_hidden_size: text.hidden_size, ..text.clone() };
        Ok(Self {
            vision: VisionModel::load(&config.vision_config, VisionFamily::Blip, vb.pp("vision_model"))?,
            questions: TextModel::load(text, vb.pp("text_encoder"))?,
            decoder: Decoder::load(&answers, vb.pp("text_decoder"))?,
            device: vb.device().clone(),
            dtype: vb.dtype(),
            config,
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &MedConfig {
        &self.config
    }

    /// The device that holds the weights.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Normalised pixels `(b, 3, s, s)` to image states `(b, 1 + patches, d_v)`, after the last layer norm.
    ///
    /// # Errors
    /// The images have another size than the config says.
    pub fn encode_image(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(self.vision.forward(pixels)?)
    }

    /// Keys and values of image states `(b, n, d_v)` for the question encoder.
    ///
    /// # Errors
    /// The width is not the one of the config.
    pub fn image_cache(&self, image_states: &Tensor) -> Result<CrossCache> {
        Ok(self.questions.cross_cache(image_states)?)
    }

    /// States `(rows, t, d)` of questions, ids and mask `(rows, t)`, with the images in view; `rows` is `b` or `b·k`, image-major.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn question_states(&self, ids: &Tensor, mask: &Tensor, images: &CrossCache) -> Result<Tensor> {
        let mask = padding_mask(mask, self.dtype)?;
        Ok(self.questions.forward(ids, Some(&mask), Some(images))?)
    }

    /// Next-token logits `(rows, t, vocab)` of whole answers `(rows, t)`, `[DEC]` first, given question states `(rows, n, d)`.
    ///
    /// All states of a question are seen, those of padding too, as transformers and BLIP do when they generate: give each question at its
    /// own length for an answer that does not depend on others.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn answer_logits(&self, ids: &Tensor, question_states: &Tensor) -> Result<Tensor> {
        let mask = causal_mask(ids.dim(1)?, self.dtype, ids.device())?;
        let cross = self.decoder.bert.cross_cache(question_states)?;
        Ok(self.decoder.logits(&self.decoder.bert.forward(ids, Some(&mask), Some(&cross))?)?)
    }

    /// The most likely token at every step, for question states `(rows, n, d)`: ids of the answers, `[DEC]` first and `[SEP]` last unless
    /// the answer was cut at `max_length` tokens.
    ///
    /// # Errors
    /// `max_length` is more than the model has positions, or the device fails.
    pub fn generate(&self, question_states: &Tensor, max_length: usize) -> Result<Vec<Vec<u32>>> {
        let (rows, text) = (question_states.dim(0)?, &self.config.text_config);
        let cross = self.decoder.bert.cross_cache(question_states)?;
        let mut cache = self.decoder.bert.self_cache(rows, max_length)?;
        let mut answers = vec![vec![text.bos_token_id]; rows];
        let mut last = vec![text.bos_token_id; rows];
        let done = |answer: &Vec<u32>| answer.len() >= max_length || answer.ends_with(&[text.sep_token_id]);
        while !answers.iter().all(done) {
            let ids = Tensor::from_slice(&last, (rows, 1), &self.device)?;
            let states = self.decoder.bert.forward_cached(&ids, &mut cache, &cross)?.squeeze(1)?;
            last = self.decoder.logits(&states)?.argmax(1)?.to_vec1()?;
            for (answer, id) in answers.iter_mut().zip(&last) {
                if !done(answer) {
                    answer.push(*id);
                }
            }
        }
        Ok(answers)
    }
}

/// Answers questions about images.
#[derive(Debug, Clone)]
pub struct Answerer {
    vqa: Vqa,
    tokenizer: TextTokenizer,
    first_token: FirstToken,
}

impl Answerer {
    /// Tokens of a question at most, first and last included (`blip_vqa.py`).
    pub const MAX_QUESTION: usize = 35;
    /// Tokens of an answer at most, first and last included (`blip_vqa.py`).
    pub const MAX_ANSWER: usize = 10;

    /// An answerer from a model and its tokenizer. Questions open with `first_token`: `[ENC]` as BLIP was trained, `[CLS]` as transformers
    /// does.
    ///
    /// # Errors
    /// The model has too few positions, or the first token lies outside its vocabulary.
    pub fn new(vqa: Vqa, tokenizer: TextTokenizer, first_token: FirstToken) -> Result<Self> {
        let text = &vqa.config.text_config;
        if text.max_position_embeddings < Self::MAX_QUESTION {
            return Err(ModelError::Config(format!(
                "the model has {} positions, questions take {}",
                text.max_position_embeddings,
                Self::MAX_QUESTION
            )));
        }
        let id = tokenizer.first_id(first_token);
        if id as usize >= text.vocab_size {
            return Err(ModelError::Config(format!("the first token {id} is outside the vocabulary of {}", text.vocab_size)));
        }
        Ok(Self { vqa, tokenizer, first_token })
    }

    /// Answers to `questions[i]`, each, about `images[i]`; each image is encoded once. Questions are cleaned first ([`clean_question`]).
    ///
    /// A question goes through the model by itself, so its answer does not depend on the others.
    ///
    /// # Errors
    /// There are not as many lists of questions as images, an image has another size than the model takes, or the device fails.
    pub fn answer<S: AsRef<str> + Sync>(&self, images: &[Pixels], questions: &[Vec<S>]) -> Result<Vec<Vec<String>>> {
        if images.len() != questions.len() {
            return Err(ModelError::Input(format!("{} images but {} lists of questions", images.len(), questions.len())));
        }
        let answer = |(image, questions): (&Pixels, &Vec<S>)| self.answer_image(image, questions);
        if self.vqa.device.is_cpu() {
            images.par_iter().zip(questions).map(answer).collect()
        } else {
            images.iter().zip(questions).map(answer).collect()
        }
    }

    fn answer_image<S: AsRef<str>>(&self, image: &Pixels, questions: &[S]) -> Result<Vec<String>> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let pixels = Pixels::stack(std::slice::from_ref(image), &self.vqa.device)?;
        let image = self.vqa.image_cache(&self.vqa.encode_image(&pixels)?)?;
        questions
            .iter()
            .map(|question| {
                let clean = clean_question(question.as_ref(), MAX_WORDS);
                let ids = self.tokenizer.encode(&clean, self.first_token, Self::MAX_QUESTION)?;
                let ids = Tensor::from_slice(&ids, (1, ids.len()), &self.vqa.device)?;
                let states = self.vqa.question_states(&ids, &ids.ones_like()?, &image)?;
                let answers = self.vqa.generate(&states, Self::MAX_ANSWER)?;
                self.tokenizer.decode(answers.first().map_or(&[], Vec::as_slice))
            })
            .collect()
    }
}
