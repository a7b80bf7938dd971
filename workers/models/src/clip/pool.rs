//! SigLIP's attention pool (`SiglipMultiheadAttentionPoolingHead`), `vision_model.head.*` in the weight file.

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::block::{BlockConfig, Mlp, attention_scale};
use crate::config::VisionConfig;
use crate::layers::{INIT_WEIGHT, LayerNorm, Linear};
use crate::ops::{Precision, attention};

/// One learned query over the image states, and an MLP.
#[derive(Debug, Clone)]
pub(super) struct PoolingHead {
    probe: Tensor,
    heads: usize,
    scale: f64,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    layer_norm: LayerNorm,
    mlp: Mlp,
}

impl PoolingHead {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub(super) fn load(config: &VisionConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        let attention = vb.pp("attention");
        let weight = attention.get_with_hints((3 * d, d), "in_proj_weight", INIT_WEIGHT)?;
        let bias = attention.get_with_hints(3 * d, "in_proj_bias", Init::Const(0.0))?;
        let part = |i: usize| Linear::new(weight.narrow(0, i * d, d)?, bias.narrow(0, i * d, d)?);
        let block = BlockConfig {
            width: d,
            heads,
            mlp_width: config.intermediate_size,
            activation: config.hidden_act,
            eps: config.layer_norm_eps,
            fused: true,
        };
        Ok(Self {
            probe: vb.get_with_hints((1, 1, d), "probe", INIT_WEIGHT)?,
            heads,
            scale: attention_scale(d, heads),
            query: part(0)?,
            key: part(1)?,
            value: part(2)?,
            output: Linear::load(d, d, attention.pp("out_proj"))?,
            layer_norm: LayerNorm::load(d, config.layer_norm_eps, vb.pp("layernorm"))?,
            mlp: Mlp::load(&block, vb.pp("mlp"))?,
        })
    }

    pub(super) fn pack(&mut self, precision: Precision) -> Result<()> {
        [&mut self.key, &mut self.value].into_iter().try_for_each(|layer| layer.pack(precision))?;
        self.mlp.pack(precision)
    }

    /// Image states `(b, n, d)` to `(b, d)`.
    pub(super) fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let (b, _, d) = states.dims3()?;
        let query = self.query.forward(&self.probe)?.broadcast_as((b, 1, d))?;
        let (k, v) = (self.key.forward(states)?, self.value.forward(states)?);
        let x = self.output.forward(&attention(&query, &k, &v, self.heads, self.scale, None)?)?;
        self.mlp.forward_add(&x, &self.layer_norm)?.squeeze(1)
    }
}
