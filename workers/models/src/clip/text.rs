//! CLIP's text transformer (pre-norm, causal; bidirectional in SigLIP): `text_model.*` in the weight file.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::{ClipFamily, ClipTextConfig};
use crate::block::{Block, BlockConfig, load_blocks};
use crate::layers::{Embedding, INIT_WEIGHT, LayerNorm};
use crate::ops::Precision;
use crate::text::causal_mask;

/// The older eos id of the configs, which stands for the highest id of a text.
const HIGHEST: u32 = 2;

/// Turns token ids into one state per text.
#[derive(Debug, Clone)]
pub(super) struct ClipText {
    tokens: Embedding,
    positions: Tensor,
    blocks: Vec<Block>,
    final_layer_norm: LayerNorm,
    pooling: Pooling,
}

/// Which position stands for the text.
#[derive(Debug, Clone, Copy)]
enum Pooling {
    /// The first one with the highest id (OpenAI's and OpenCLIP's rule).
    Highest,
    /// The first one with this id.
    First(u32),
    /// The last one.
    Last,
}

impl ClipText {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub(super) fn load(config: &ClipTextConfig, family: ClipFamily, vb: VarBuilder<'_>) -> Result<Self> {
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        let block = BlockConfig {
            width: d,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            activation: config.hidden_act,
            eps,
            fused: false,
        };
        let embeddings = vb.pp("embeddings");
        Ok(Self {
            tokens: Embedding::load(config.vocab_size, d, embeddings.pp("token_embedding"))?,
            positions: embeddings.get_with_hints(
                (config.max_position_embeddings, d),
                "position_embedding.weight",
                INIT_WEIGHT,
            )?,
            blocks: load_blocks(&block, config.num_hidden_layers, vb.pp("encoder.layers"))?,
            final_layer_norm: LayerNorm::load(d, eps, vb.pp("final_layer_norm"))?,
            pooling: match (family, config.eos_token_id) {
                (ClipFamily::Siglip, _) => Pooling::Last,
                (ClipFamily::Clip, HIGHEST) => Pooling::Highest,
                (ClipFamily::Clip, eos) => Pooling::First(eos),
            },
        })
    }

    pub(super) fn pack(&mut self, precision: Precision) -> Result<()> {
        self.blocks.iter_mut().try_for_each(|block| block.pack(precision))
    }

    /// Ids `(b, t)` (u32) to hidden states `(b, t, d)` after the last layer norm.
    pub(super) fn states(&self, ids: &Tensor) -> Result<Tensor> {
        let t = ids.dim(1)?;
        let longest = self.positions.dim(0)?;
        if t > longest {
            candle_core::bail!("a text of {t} tokens does not fit the model's {longest} positions");
        }
        let mut x = self.tokens.forward(ids)?.broadcast_add(&self.positions.narrow(0, 0, t)?)?;
        let mask = match self.pooling {
            Pooling::Last => None,
            _ => Some(causal_mask(t, x.dtype(), x.device())?),
        };
        for block in &self.blocks {
            x = block.forward(&x, mask.as_ref())?;
        }
        self.final_layer_norm.forward(&x)
    }

    /// Ids `(b, t)` to the states `(b, d)` that stand for the texts.
    ///
    /// Padding needs no mask: behind the end of a text no causal state sees it, and SigLIP was trained to see it.
    pub(super) fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let states = self.states(ids)?;
        let (b, t, d) = states.dims3()?;
        let places = match self.pooling {
            Pooling::Last => return states.narrow(1, t - 1, 1)?.squeeze(1),
            Pooling::Highest => first_highest(&ids.to_vec2::<u32>()?),
            // As transformers: 0 where the id is missing.
            Pooling::First(eos) => first_highest(&ids.eq(eos)?.to_dtype(DType::U32)?.to_vec2()?),
        };
        let rows: Vec<u32> = places.iter().enumerate().map(|(row, place)| (row * t + place) as u32).collect();
        states.reshape((b * t, d))?.index_select(&Tensor::new(rows, ids.device())?, 0)
    }
}

/// The first place of the highest number of each row.
fn first_highest(rows: &[Vec<u32>]) -> Vec<usize> {
    let place = |row: &Vec<u32>| row.iter().enumerate().rev().max_by_key(|(_, id)| **id).map_or(0, |(place, _)| place);
    rows.iter().map(place).collect()
}
