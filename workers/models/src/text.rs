//! The text transformer of MED (post-norm BERT with optional cross-attention): one stack of layers for three modes.
//!
//! | mode | self-attention | cross-attention |
//! |---|---|---|
//! | text encoder | bidirectional | none |
//! | image-grounded encoder | bidirectional | to the image states |
//! | image-grounded decoder | causal | to the image states |

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use crate::block::attention_scale;
use crate::config::TextConfig;
use crate::layers::{Around, Embedding, LayerNorm, Linear, mlp};
use crate::ops::{
    Activation, PackedCrossAttention, PackedStates, Precision, attention, attention_kv, attention_qkv, attention_split, dense,
    on_cpu, split_heads,
};

/// Added to the score of a position that must not be seen (the value of BLIP).
const MASKED: f32 = -10_000.0;

/// Word and position embeddings and the layers: `text_encoder.*` or `text_decoder.bert.*` in the weight file.
#[derive(Debug, Clone)]
pub struct TextModel {
    words: Embedding,
    positions: Embedding,
    layer_norm: LayerNorm,
    layers: Vec<Layer>,
    max_positions: usize,
}

/// What every layer's cross-attention reads of the images, computed once per image: keys and values, or, of a packed model, the states.
///
/// With `k` texts per image, the rows of the text batch are image-major: row `i·k + j` is
/// text `j` of image `i`.
#[derive(Debug, Clone)]
pub struct CrossCache {
    layers: Vec<KeysValues>,
}

/// What one layer reads of the images.
#[derive(Debug, Clone)]
enum KeysValues {
    /// `(images, states, d)` each.
    Tensors(Tensor, Tensor),
    /// In training: side by side, `(images, states, 2 d)`, and the images that are asked, in order.
    Joined(Tensor, Arc<[u32]>),
    /// `(images, heads, states, width)` each: so products on a GPU read them as they are, step for step.
    Split(Tensor, Tensor),
    /// The states themselves, the same for all layers.
    Packed(PackedStates),
}

/// Keys and values of the tokens so far, preallocated for the longest text: per layer `(rows, max_length, d)`.
#[derive(Debug)]
pub struct SelfCache {
    layers: Vec<(Tensor, Tensor)>,
    length: usize,
}

#[derive(Debug, Clone)]
struct Layer {
    attention: Attention,
    cross: Attention,
    intermediate: Linear,
    output: Linear,
    layer_norm: LayerNorm,
}

/// Projections of one attention part with its output layer, residual and layer norm.
#[derive(Debug, Clone)]
struct Attention {
    heads: usize,
    scale: f64,
    query: Linear,
    sources: Sources,
    dense: Linear,
    layer_norm: LayerNorm,
}

/// How queries meet what they ask.
#[derive(Debug, Clone)]
enum Sources {
    /// By its keys and values.
    Projected { key: Linear, value: Linear },
    /// As it is, with the weights of keys and values absorbed: cross-attention, once packed.
    Absorbed(PackedCrossAttention),
}

impl TextModel {
    /// Reads the weights below the builder's prefix.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(config: &TextConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let d = config.hidden_size;
        let embeddings = vb.pp("embeddings");
        let layers = vb.pp("encoder.layer");
        Ok(Self {
            words: Embedding::load(config.vocab_size, d, embeddings.pp("word_embeddings"))?,
            positions: Embedding::load(config.max_position_embeddings, d, embeddings.pp("position_embeddings"))?,
            layer_norm: LayerNorm::load(d, config.layer_norm_eps, embeddings.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(|i| Layer::load(config, layers.pp(i))).collect::<Result<_>>()?,
            max_positions: config.max_position_embeddings,
        })
    }

    /// The word embedding table `(vocab, d)`, which the language-model head shares.
    #[must_use]
    pub fn word_embeddings(&self) -> &Tensor {
        self.words.weight()
    }

    /// See [`Med::pack`](crate::med::Med::pack).
    pub(crate) fn pack(&mut self, precision: Precision) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.pack(precision))
    }

    /// What every layer reads of the image states `(b, n, d_v)`.
    ///
    /// # Errors
    /// The width is not the one of the config.
    pub fn cross_cache(&self, image_states: &Tensor) -> Result<CrossCache> {
        if let Some(Sources::Absorbed(absorbed)) = self.layers.first().map(|layer| &layer.cross.sources) {
            let states = absorbed.states(image_states)?;
            return Ok(CrossCache { layers: self.layers.iter().map(|_| KeysValues::Packed(states.clone())).collect() });
        }
        let layers = self.layers.iter().map(|layer| {
            if let Sources::Projected { key, value } = &layer.cross.sources
                && let (Some(key), Some(value)) = (key.tensors(), value.tensors())
                && let Some(joined) = dense(image_states, &[key, value], None, None, None)?
            {
                let all = (0..joined.dim(0)? as u32).collect();
                return Ok(KeysValues::Joined(joined, all));
            }
            let (k, v) = layer.cross.keys_values(image_states)?;
            Ok(match on_cpu(&[&k, &v]) {
                true => KeysValues::Tensors(k, v),
                false => KeysValues::Split(split_heads(&k, layer.cross.heads)?, split_heads(&v, layer.cross.heads)?),
            })
        });
        Ok(CrossCache { layers: layers.collect::<Result<_>>()? })
    }

    /// Ids `(rows, t)` to hidden states `(rows, t, d)`, whole sequences at once.
    ///
    /// `mask` is additive and `(rows or 1, 1, t or 1, t)` (see [`padding_mask`] and [`causal_mask`]). With `cross` of
    /// `b` images, `rows` is `b·k`, image-major.
    ///
    /// # Errors
    /// The text is longer than the position table, or shapes do not fit.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>, cross: Option<&CrossCache>) -> Result<Tensor> {
        through(&self.layers, self.embed(ids, 0)?, mask, cross)
    }

    /// The first token's state of [`Self::forward`]: `(rows, d)`. The last layer leaves the others out.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_first(&self, ids: &Tensor, mask: Option<&Tensor>, cross: Option<&CrossCache>) -> Result<Tensor> {
        let x = self.embed(ids, 0)?;
        let first = |x: &Tensor| x.narrow(1, 0, 1)?.contiguous();
        let Some((last, layers)) = self.layers.split_last() else { return first(&x)?.squeeze(1) };
        let x = through(layers, x, mask, cross)?;
        let (k, v) = last.attention.keys_values(&x)?;
        let mask = mask.map(|mask| mask.narrow(2, 0, 1)).transpose()?;
        let attended = last.attention.ask(&first(&x)?, &k, &v, mask.as_ref())?;
        last.forward_attended(attended, cross.and_then(|cache| cache.layers.last()))?.squeeze(1)
    }

    /// An empty cache for texts of up to `max_length` tokens.
    ///
    /// # Errors
    /// The device has no memory for it.
    pub fn self_cache(&self, rows: usize, max_length: usize) -> Result<SelfCache> {
        let weight = self.words.weight();
        let zeros = || Tensor::zeros((rows, max_length, weight.dim(1)?), weight.dtype(), weight.device());
        let layers = self.layers.iter().map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(SelfCache { layers, length: 0 })
    }

    /// The next tokens `(rows, t)` after those in the cache, causally: hidden states `(rows, t, d)`. Fills the cache.
    ///
    /// # Errors
    /// The cache is full, or shapes do not fit.
    pub fn forward_cached(&self, ids: &Tensor, cache: &mut SelfCache, cross: &CrossCache) -> Result<Tensor> {
        let t = ids.dim(1)?;
        let (start, end) = (cache.length, cache.length + t);
        // Without earlier tokens the mask is square; a single new token sees all that came before.
        let mask = match (start, t) {
            (_, 1) => None,
            (0, _) => Some(causal_mask(t, self.words.weight().dtype(), ids.device())?),
            _ => candle_core::bail!("several tokens can only be added to an empty cache"),
        };
        let mut x = self.embed(ids, start)?;
        for ((layer, kept), image) in self.layers.iter().zip(&cache.layers).zip(&cross.layers) {
            let (k, v) = layer.attention.keys_values(&x)?;
            kept.0.slice_set(&k, 1, start)?;
            kept.1.slice_set(&v, 1, start)?;
            let (k, v) = (kept.0.narrow(1, 0, end)?, kept.1.narrow(1, 0, end)?);
            x = layer.forward_attended(layer.attention.ask(&x, &k, &v, mask.as_ref())?, Some(image))?;
        }
        cache.length = end;
        Ok(x)
    }

    fn embed(&self, ids: &Tensor, start: usize) -> Result<Tensor> {
        let t = ids.dim(1)?;
        if start + t > self.max_positions {
            candle_core::bail!("a text of {} tokens does not fit the model's {} positions", start + t, self.max_positions);
        }
        let positions = self.positions.weight().narrow(0, start, t)?;
        self.layer_norm.forward(&self.words.forward(ids)?.broadcast_add(&positions)?)
    }
}

/// What layers, the first of a model, make of embedded texts, which may look at images.
fn through(layers: &[Layer], mut x: Tensor, mask: Option<&Tensor>, cross: Option<&CrossCache>) -> Result<Tensor> {
    for (i, layer) in layers.iter().enumerate() {
        let attended = layer.attention.forward(&x, mask)?;
        x = layer.forward_attended(attended, cross.map(|cache| &cache.layers[i]))?;
    }
    Ok(x)
}

impl Layer {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(config: &TextConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (d, ff) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            attention: Attention::load(config, d, vb.pp("attention"))?,
            cross: Attention::load(config, config.encoder_hidden_size, vb.pp("crossattention"))?,
            intermediate: Linear::load(d, ff, vb.pp("intermediate.dense"))?,
            output: Linear::load(ff, d, vb.pp("output.dense"))?,
            layer_norm: LayerNorm::load(d, config.layer_norm_eps, vb.pp("output.LayerNorm"))?,
        })
    }

    /// What becomes of states that have attended to each other.
    fn forward_attended(&self, mut x: Tensor, images: Option<&KeysValues>) -> Result<Tensor> {
        if let Some(images) = images {
            x = self.cross.forward_images(&x, images)?;
        }
        let x = mlp((&self.intermediate, &self.output), &x, None, Activation::Gelu)?;
        self.layer_norm.forward(&x)
    }

    fn pack(&mut self, precision: Precision) -> Result<()> {
        self.attention.pack(precision)?;
        self.cross.absorb(precision)?;
        self.cross.pack(precision)?;
        self.intermediate.pack(precision)?;
        self.output.pack(precision)
    }
}

impl Attention {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(config: &TextConfig, source: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let d = config.hidden_size;
        Ok(Self {
            heads: config.num_attention_heads,
            scale: attention_scale(d, config.num_attention_heads),
            query: Linear::load(d, d, vb.pp("self.query"))?,
            sources: Sources::Projected {
                key: Linear::load(source, d, vb.pp("self.key"))?,
                value: Linear::load(source, d, vb.pp("self.value"))?,
            },
            dense: Linear::load(d, d, vb.pp("output.dense"))?,
            layer_norm: LayerNorm::load(d, config.layer_norm_eps, vb.pp("output.LayerNorm"))?,
        })
    }

    fn pack(&mut self, precision: Precision) -> Result<()> {
        if let Sources::Projected { key, value } = &mut self.sources {
            key.pack(precision)?;
            value.pack(precision)?;
        }
        self.query.pack(precision)?;
        self.dense.pack(precision)
    }

    /// `(b, n, source)` to keys and values `(b, n, d)`.
    fn keys_values(&self, source: &Tensor) -> Result<(Tensor, Tensor)> {
        match &self.sources {
            Sources::Projected { key, value } => Ok((key.forward(source)?, value.forward(source)?)),
            Sources::Absorbed(_) => candle_core::bail!("a packed model makes no keys and values of an image"),
        }
    }

    /// Takes the weights of keys and values over to the side of the queries; before they are packed.
    fn absorb(&mut self, precision: Precision) -> Result<()> {
        if let Sources::Projected { key, value } = &self.sources
            && let (Some((key, _)), Some((value, bias))) = (key.tensors(), value.tensors())
            && let Some(absorbed) = PackedCrossAttention::new(key, value, bias, self.heads, self.scale, precision)?
        {
            self.sources = Sources::Absorbed(absorbed);
        }
        Ok(())
    }

    /// States `(b, n, d)` attend to each other.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        if let Sources::Projected { key, value } = &self.sources
            && let (Some(query), Some(key), Some(value)) = (self.query.tensors(), key.tensors(), value.tensors())
            && let Some(qkv) = dense(x, &[query, key, value], None, None, None)?
        {
            return self.output(x, &attention_qkv(&qkv, self.heads, self.scale, mask)?);
        }
        let (k, v) = self.keys_values(x)?;
        self.ask(x, &k, &v, mask)
    }

    /// States `(b, n, d)` ask for keys and values `(b, k, d)`.
    fn ask(&self, x: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let q = self.query.forward(x)?;
        self.output(x, &attention(&q, k, v, self.heads, self.scale, mask)?)
    }

    /// Texts `(rows, t, d)` ask images; the rows of an image stand side by side.
    fn forward_images(&self, x: &Tensor, images: &KeysValues) -> Result<Tensor> {
        let (rows, t, d) = x.dims3()?;
        let count = images.len()?;
        if rows % count.max(1) != 0 {
            candle_core::bail!("{rows} texts cannot be spread evenly over {count} images");
        }
        // All texts of an image ask the same keys and values: they go in as one long query.
        let q = self.query.forward(x)?.reshape((count, rows / count * t, d))?;
        let context = match images {
            KeysValues::Tensors(k, v) => attention(&q, k, v, self.heads, self.scale, None)?,
            KeysValues::Joined(kv, of) => attention_kv(&q, kv, of, self.heads, self.scale)?,
            KeysValues::Split(k, v) => attention_split(&q, k, v, self.scale)?,
            KeysValues::Packed(states) => match &self.sources {
                Sources::Absorbed(absorbed) => absorbed.attend(&q, states)?,
                Sources::Projected { .. } => candle_core::bail!("the states of the images are for a packed model"),
            },
        };
        self.output(x, &context.reshape((rows, t, d))?)
    }

    fn output(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        self.layer_norm.forward(&self.dense.forward_with(context, Around::added(x))?)
    }
}

impl CrossCache {
    /// The cache of the images with these indices `(n)` (u32), in this order.
    ///
    /// # Errors
    /// An index is out of range.
    pub fn select(&self, images: &Tensor) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| layer.select(images)).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Leaves the images with these numbers, in this order. Only an image whose place changes is copied.
    ///
    /// # Errors
    /// An image goes to a place behind its own, which would be that of another.
    pub(crate) fn keep(&mut self, images: &[usize]) -> Result<()> {
        match self.layers.first() {
            // A GPU does one thing after the other.
            Some(KeysValues::Split(..)) => self.layers.iter_mut().try_for_each(|layer| layer.keep(images)),
            _ => self.layers.par_iter_mut().try_for_each(|layer| layer.keep(images)),
        }
    }
}

impl SelfCache {
    /// The number of tokens in the cache.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// The number of texts in the cache.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.layers.first().map_or(0, |(k, _)| k.dims()[0])
    }

    /// Leaves the rows with these numbers, in this order; a row may be taken many times.
    ///
    /// # Errors
    /// A number is out of range.
    pub(crate) fn keep(&mut self, rows: &[u32]) -> Result<()> {
        let unchanged = rows.len() == self.rows() && rows.iter().zip(0..).all(|(row, place)| *row == place);
        if let Some((k, _)) = self.layers.first().filter(|_| !unchanged) {
            let rows = Tensor::new(rows, k.device())?;
            let keep = |(k, v): &(Tensor, Tensor)| Ok((k.index_select(&rows, 0)?, v.index_select(&rows, 0)?));
            self.layers = match k.device().is_cpu() {
                true => self.layers.par_iter().map(keep).collect::<Result<_>>()?,
                false => self.layers.iter().map(keep).collect::<Result<_>>()?,
            };
        }
        Ok(())
    }
}

impl KeysValues {
    /// The number of images.
    fn len(&self) -> Result<usize> {
        match self {
            Self::Tensors(k, _) | Self::Split(k, _) => k.dim(0),
            Self::Joined(_, of) => Ok(of.len()),
            Self::Packed(packed) => Ok(packed.len()),
        }
    }

    /// See [`CrossCache::keep`].
    fn keep(&mut self, images: &[usize]) -> Result<()> {
        match self {
            Self::Tensors(k, v) | Self::Split(k, v) => keep_rows(k, images).and_then(|()| keep_rows(v, images)),
            Self::Joined(_, of) => {
                *of = images.iter().map(|&image| of[image]).collect();
                Ok(())
            }
            Self::Packed(packed) => {
                *packed = packed.select(images);
                Ok(())
            }
        }
    }

    fn select(&self, images: &Tensor) -> Result<Self> {
        Ok(match self {
            Self::Tensors(k, v) => Self::Tensors(k.index_select(images, 0)?, v.index_select(images, 0)?),
            Self::Split(k, v) => Self::Split(k.index_select(images, 0)?, v.index_select(images, 0)?),
            Self::Joined(..) | Self::Packed(_) => {
                let images: Vec<usize> = images.to_vec1::<u32>()?.into_iter().map(|image| image as usize).collect();
                let known = self.len()?;
                if images.iter().any(|&image| image >= known) {
                    candle_core::bail!("{images:?} are not all among {known} images");
                }
                let mut chosen = self.clone();
                chosen.keep(&images)?;
                chosen
            }
        })
    }
}

/// Leaves these rows, in place.
fn keep_rows(cache: &mut Tensor, rows: &[usize]) -> Result<()> {
    for (to, from) in rows.iter().enumerate().filter(|(to, from)| to != *from) {
        if to > *from {
            candle_core::bail!("row {from} cannot go back to place {to}");
        }
        cache.slice_set(&cache.narrow(0, *from, 1)?.force_contiguous()?, 0, to)?;
    }
    *cache = cache.narrow(0, 0, rows.len())?;
    Ok(())
}

/// An additive mask `(b, 1, 1, t)` from a mask `(b, t)` that is 1 for tokens and 0 for padding (any number type).
///
/// # Errors
/// The tensor library failed.
pub fn padding_mask(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    let (b, t) = mask.dims2()?;
    // (1 - mask) · MASKED
    mask.to_dtype(DType::F32)?.affine(f64::from(-MASKED), f64::from(MASKED))?.to_dtype(dtype)?.reshape((b, 1, 1, t))
}

/// An additive mask `(1, 1, t, t)` that hides every later token.
///
/// # Errors
/// The tensor library failed.
pub fn causal_mask(t: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = (0..t).flat_map(|row| (0..t).map(move |column| if column > row { MASKED } else { 0.0 })).collect();
    Tensor::from_vec(values, (1, 1, t, t), device)?.to_dtype(dtype)
}
