//! What a language model knows of words, for a fresh model with a vocabulary of its own: BLIP's text transformer begins as BERT does; a smaller one can
//! begin with BERT's word embeddings.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use tokenizers::Tokenizer;

use crate::error::{ModelError, Result};
use crate::random::Stream;
use crate::tokenizer::{TextTokenizer, of_folder};
use crate::weights::Weights;

/// How the table's name ends in BERT and its kin.
const TABLE: &str = "embeddings.word_embeddings.weight";
const UNKNOWN: &str = "[UNK]";
/// The token that opens a text there, for those that do here.
const FIRST: &str = "[CLS]";
const FIRSTS: [&str; 2] = ["[DEC]", "[ENC]"];

/// The embeddings `(vocabulary, width)` that were drawn afresh, with those of a BERT in `folder` in place of every token that it knows: the mean of the
/// pieces that it cuts the token into, less the mean of all, in `width` random directions (Johnson and Lindenstrauss: distances stay about what they
/// are), as far spread as what was drawn.
///
/// # Errors
/// The folder holds no BERT, or one without a vocabulary.
pub(super) fn known_words(folder: &Path, tokenizer: &TextTokenizer, drawn: &Tensor, seed: u64) -> Result<Tensor> {
    let weights = Weights::open(folder)?;
    let mut tables = weights.tensors().filter(|(name, _)| name.ends_with(TABLE)).map(|(name, _)| name.to_owned());
    let (Some(name), None) = (tables.next(), tables.next()) else {
        return Err(ModelError::Config(format!("{} has not one tensor that ends in {TABLE}: it is no BERT", folder.display())));
    };
    let table = weights.read(&name, &Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let theirs = of_folder(folder)?;
    let (rows, width) = drawn.dims2()?;
    let known: Vec<Option<Vec<f32>>> =
        (0..rows as u32).map(|id| tokenizer.token(id).and_then(|token| vector(&token, &theirs, &table))).collect();

    let found: Vec<&Vec<f32>> = known.iter().flatten().collect();
    let Some(their_width) = found.first().map(|vector| vector.len()) else {
        return Err(ModelError::Config(format!("{} knows no word of the vocabulary", folder.display())));
    };
    let mut mean = vec![0.0_f32; their_width];
    for vector in &found {
        mean.iter_mut().zip(*vector).for_each(|(sum, x)| *sum += x / found.len() as f32);
    }
    let mut stream = Stream::new("word directions", seed, &[]);
    let directions: Vec<Vec<f32>> = (0..their_width).map(|_| (0..width).map(|_| stream.normal() as f32).collect()).collect();
    let project = |vector: &Vec<f32>| {
        let mut projected = vec![0.0_f32; width];
        for ((x, mean), direction) in vector.iter().zip(&mean).zip(&directions) {
            projected.iter_mut().zip(direction).for_each(|(sum, direction)| *sum += (x - mean) * direction);
        }
        projected
    };
    let projected: Vec<Option<Vec<f32>>> = known.iter().map(|vector| vector.as_ref().map(project)).collect();
    let spread = |rows: &mut dyn Iterator<Item = &f32>| {
        let (count, sum) = rows.fold((0.0_f64, 0.0_f64), |(count, sum), x| (count + 1.0, sum + f64::from(*x).powi(2)));
        (sum / count.max(1.0)).sqrt()
    };
    let fresh = drawn.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
    let scale = spread(&mut fresh.iter().flatten()) / spread(&mut projected.iter().flatten().flatten()).max(f64::MIN_POSITIVE);
    let rows: Vec<f32> = projected
        .into_iter()
        .zip(fresh)
        .flat_map(|(known, fresh)| known.map_or(fresh, |known| known.into_iter().map(|x| x * scale as f32).collect()))
        .collect();
    Ok(Tensor::from_vec(rows, drawn.shape(), drawn.device())?)
}

/// What a BERT says of a token; nothing if it does not know it.
fn vector(token: &str, theirs: &Tokenizer, table: &[Vec<f32>]) -> Option<Vec<f32>> {
    let token = if FIRSTS.contains(&token) { FIRST } else { token };
    let pieces = match theirs.token_to_id(token) {
        Some(id) => vec![id],
        None if token.starts_with("##") || token.starts_with('[') => return None,
        None => theirs.encode_fast(token, false).ok()?.get_ids().to_vec(),
    };
    let unknown = theirs.token_to_id(UNKNOWN);
    if pieces.is_empty() || pieces.iter().any(|piece| Some(*piece) == unknown) {
        return None;
    }
    let vectors: Vec<&Vec<f32>> = pieces.iter().map(|piece| table.get(*piece as usize)).collect::<Option<_>>()?;
    let width = vectors[0].len();
    Some((0..width).map(|i| vectors.iter().map(|vector| vector[i]).sum::<f32>() / vectors.len() as f32).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::MedConfig;
    use crate::tokenizer::train_wordpiece;
    use crate::weights::write_file;

    #[test]
    fn known_words_keep_their_neighbours_and_unknown_ones_what_was_drawn() {
        let device = &Device::Cpu;
        let folder = tempfile::tempdir().unwrap();
        let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "puppy", "bus", "##es"];
        std::fs::write(folder.path().join("vocab.txt"), words.join("\n")).unwrap();
        // A dog is like a puppy, and a bus like neither.
        let row = |word: usize, i: usize| match (word, i) {
            (5 | 6, 0..8) | (7, 8..16) => 1.0,
            (6, 8) | (8, 3) => 0.3,
            _ => 0.01 * ((word * 31 + i * 7) % 5) as f32,
        };
        let table: Vec<f32> = (0..words.len()).flat_map(|word| (0..24).map(move |i| row(word, i))).collect();
        let table = Tensor::from_vec(table, (words.len(), 24), device).unwrap();
        write_file(&folder.path().join("model.safetensors"), [("bert.embeddings.word_embeddings.weight", table)]).unwrap();

        let json = train_wordpiece(&["dog puppy bus zebra", "dog puppy bus zebra", "dog puppy bus zebra"], 60).unwrap();
        let config = MedConfig::tiny(60);
        let tokenizer = TextTokenizer::from_json(json, &config.text_config, Path::new("tokenizer.json")).unwrap();
        let drawn = Tensor::randn(0_f32, 0.05, (60, 256), device).unwrap();
        let made = known_words(folder.path(), &tokenizer, &drawn, 1).unwrap();
        assert_eq!(
            made.to_vec2::<f32>().unwrap(),
            known_words(folder.path(), &tokenizer, &drawn, 1).unwrap().to_vec2::<f32>().unwrap()
        );
        let (made, drawn) = (made.to_vec2::<f32>().unwrap(), drawn.to_vec2::<f32>().unwrap());
        let of = |word: &str| (0..60).find(|id| tokenizer.token(*id).as_deref() == Some(word)).unwrap() as usize;
        let cosine = |a: &str, b: &str| {
            let (a, b) = (&made[of(a)], &made[of(b)]);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        assert!(
            cosine("dog", "puppy") > 0.7 && cosine("dog", "bus") < 0.3,
            "{} {}",
            cosine("dog", "puppy"),
            cosine("dog", "bus")
        );
        assert_eq!(made[of("zebra")], drawn[of("zebra")]);

        std::fs::remove_file(folder.path().join("vocab.txt")).unwrap();
        assert!(known_words(folder.path(), &tokenizer, &Tensor::zeros((60, 8), DType::F32, device).unwrap(), 1).is_err());
    }
}
