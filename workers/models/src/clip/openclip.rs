//! Names of OpenAI's CLIP and of OpenCLIP for those of Hugging Face (as `convert_clip_original_pytorch_to_hf.py`
//! of transformers renames them).

use std::collections::BTreeMap;

use candle_core::Tensor;

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

/// The tensors of Hugging Face's layout in OpenCLIP's.
///
/// # Errors
/// The tensor library failed.
pub(crate) fn arrange(tensors: &BTreeMap<String, Tensor>) -> candle_core::Result<BTreeMap<String, Tensor>> {
    let mut arranged = BTreeMap::new();
    let mut thirds = BTreeMap::<String, BTreeMap<usize, Tensor>>::new();
    for (name, tensor) in tensors {
        let Source { name, part } = source(name, false);
        match part {
            Part::Whole => drop(arranged.insert(name, tensor.clone())),
            Part::Transposed => drop(arranged.insert(name, tensor.t()?.contiguous()?)),
            Part::Third(third) => drop(thirds.entry(name).or_default().insert(third, tensor.clone())),
        }
    }
    for (name, parts) in thirds {
        arranged.insert(name, Tensor::cat(&parts.into_values().collect::<Vec<_>>(), 0)?);
    }
    Ok(arranged)
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
