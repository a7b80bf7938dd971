//! Weights in the layout of OpenAI's CLIP and of OpenCLIP, read by the names of Hugging Face (as `convert_clip_original_pytorch_to_hf.py`
//! of transformers renames them).

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

/// What a tensor of Hugging Face's layout is in OpenCLIP's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name there.
    pub name: String,
    /// Which part of the tensor of that name it is.
    pub part: Part,
}

/// How a tensor is taken from its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// As it is.
    Whole,
    /// A matrix, transposed.
    Transposed,
    /// The first, second or last third of the rows: queries, keys or values.
    Third(usize),
}

/// Whether a source of tensors has OpenCLIP's layout.
#[must_use]
pub fn is_open_clip(vb: &VarBuilder<'_>) -> bool {
    vb.contains_tensor("visual.conv1.weight")
}

/// A source of tensors in OpenCLIP's layout as one in Hugging Face's.
#[must_use]
pub fn hugging_face(vb: VarBuilder<'_>) -> VarBuilder<'_> {
    let (dtype, device) = (vb.dtype(), vb.device().clone());
    // Models with `custom_text` keep the text side apart.
    let custom_text = vb.contains_tensor("text.token_embedding.weight");
    VarBuilder::from_backend(Box::new(OpenClip { inner: vb, custom_text }), dtype, device)
}

/// Where OpenCLIP has the tensor that Hugging Face calls `name`; `custom_text` if the text side lies below `text`.
#[must_use]
pub fn source(name: &str, custom_text: bool) -> Source {
    let text = if custom_text { "text." } else { "" };
    let layers = |prefix: &str, rest: &str| {
        let (number, inside) = rest.split_once('.').unwrap_or((rest, ""));
        let (inside, part) = in_block(inside);
        Source { name: format!("{prefix}transformer.resblocks.{number}.{inside}"), part }
    };
    let whole = |name: String| Source { name, part: Part::Whole };
    if let Some(rest) = name.strip_prefix("vision_model.encoder.layers.") {
        return layers("visual.", rest);
    }
    if let Some(rest) = name.strip_prefix("text_model.encoder.layers.") {
        return layers(text, rest);
    }
    match name {
        "visual_projection.weight" => Source { name: "visual.proj".to_owned(), part: Part::Transposed },
        "text_projection.weight" => Source { name: format!("{text}text_projection"), part: Part::Transposed },
        "vision_model.embeddings.class_embedding" => whole("visual.class_embedding".to_owned()),
        "vision_model.embeddings.position_embedding.weight" => whole("visual.positional_embedding".to_owned()),
        "text_model.embeddings.position_embedding.weight" => whole(format!("{text}positional_embedding")),
        _ => {
            let renamed = [
                ("vision_model.embeddings.patch_embedding", "visual.conv1".to_owned()),
                ("vision_model.pre_layrnorm", "visual.ln_pre".to_owned()),
                ("vision_model.post_layernorm", "visual.ln_post".to_owned()),
                ("text_model.embeddings.token_embedding", format!("{text}token_embedding")),
                ("text_model.final_layer_norm", format!("{text}ln_final")),
            ];
            let found = renamed.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
            whole(found.unwrap_or_else(|| name.to_owned()))
        }
    }
}

/// The name inside a block.
fn in_block(name: &str) -> (String, Part) {
    for (third, projection) in ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."].iter().enumerate() {
        if let Some(kind) = name.strip_prefix(projection) {
            return (format!("attn.in_proj_{kind}"), Part::Third(third));
        }
    }
    let renamed = [
        ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."),
        ("self_attn.out_proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
    ];
    let found = renamed.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
    (found.unwrap_or_else(|| name.to_owned()), Part::Whole)
}

struct OpenClip<'a> {
    inner: VarBuilder<'a>,
    custom_text: bool,
}

impl SimpleBackend for OpenClip<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, _: &Device) -> Result<Tensor> {
        let Source { name, part } = source(name, self.custom_text);
        let mut dims = shape.dims().to_vec();
        match part {
            Part::Whole => self.inner.get_with_hints_dtype(shape, &name, init, dtype),
            Part::Transposed => {
                dims.reverse();
                self.inner.get_with_hints_dtype(dims, &name, init, dtype)?.t()?.contiguous()
            }
            Part::Third(third) => {
                let rows = dims[0];
                dims[0] = 3 * rows;
                self.inner.get_with_hints_dtype(dims, &name, init, dtype)?.narrow(0, third * rows, rows)?.contiguous()
            }
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name} was asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.inner.contains_tensor(&source(name, self.custom_text).name)
    }
}
