//! Image-text retrieval: recall at k in both directions.

use crate::TrainerError;

/// Which texts describe which images. An image may have several texts, and a text may describe several images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relevance {
    texts_of_image: Vec<Vec<usize>>,
    images_of_text: Vec<Vec<usize>>,
}

impl Relevance {
    /// From the texts of each image, as indices below `texts`.
    ///
    /// # Errors
    ///
    /// [`TrainerError::Retrieval`] when an index is out of range, or an image or a text has no counterpart: its recall would not be
    /// defined.
    pub fn new(texts_of_image: Vec<Vec<usize>>, texts: usize) -> Result<Self, TrainerError> {
        let mut images_of_text = vec![Vec::new(); texts];
        for (image, of_image) in texts_of_image.iter().enumerate() {
            if of_image.is_empty() {
                return Err(TrainerError::Retrieval(format!("image {image} has no text")));
            }
            for &text in of_image {
                images_of_text
                    .get_mut(text)
                    .ok_or_else(|| TrainerError::Retrieval(format!("image {image} names text {text} of {texts}")))?
                    .push(image);
            }
        }
        if let Some(text) = images_of_text.iter().position(Vec::is_empty) {
            return Err(TrainerError::Retrieval(format!("text {text} describes no image")));
        }
        Ok(Self { texts_of_image, images_of_text })
    }

    /// Number of images.
    pub fn images(&self) -> usize {
        self.texts_of_image.len()
    }

    /// Number of texts.
    pub fn texts(&self) -> usize {
        self.images_of_text.len()
    }
}

/// Shares of queries, in `0..=1`, whose first right answer is among the first 1, 5 and 10.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recall {
    /// From an image to its texts (TR).
    pub text_at: [f64; 3],
    /// From a text to its images (IR).
    pub image_at: [f64; 3],
}

/// How many wrong answers come before the first right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    /// Of each image, among texts.
    pub of_images: Vec<usize>,
    /// Of each text, among images.
    pub of_texts: Vec<usize>,
}

/// Ranks from scores of every pair: `text_scores` orders the texts of each image and `image_scores` the images of each text, both
/// row-major `(images, texts)`, higher is better. They are the same matrix unless re-ranking differs by direction.
///
/// A wrong answer with an equal score counts as ahead, so a scorer that cannot tell pairs apart gets no credit; NaN counts as the
/// lowest score.
///
/// # Errors
///
/// [`TrainerError::Retrieval`] when a matrix does not have `images × texts` entries or there is nothing to judge.
pub fn ranks(text_scores: &[f32], image_scores: &[f32], relevance: &Relevance) -> Result<Ranks, TrainerError> {
    let (images, texts) = (relevance.images(), relevance.texts());
    for scores in [text_scores, image_scores] {
        if images == 0 || scores.len() != images * texts {
            return Err(TrainerError::Retrieval(format!("{} scores for {images} images and {texts} texts", scores.len())));
        }
    }
    let of_images = (0..images).map(|image| {
        let row = &text_scores[image * texts..(image + 1) * texts];
        first_right_rank(row.iter().copied(), &relevance.texts_of_image[image])
    });
    let of_texts = (0..texts).map(|text| {
        let column = (0..images).map(|image| image_scores[image * texts + text]);
        first_right_rank(column, &relevance.images_of_text[text])
    });
    Ok(Ranks { of_images: of_images.collect(), of_texts: of_texts.collect() })
}

/// Recall from ranks. Each image counts as often as its weight says, each text as often as its images do; nothing if none counts.
pub fn recall(ranks: &Ranks, relevance: &Relevance, weights: &[f64]) -> Option<Recall> {
    let of_texts = relevance.images_of_text.iter().map(|images| images.iter().map(|&image| weights[image]).sum::<f64>());
    let (text_at, image_at) = (
        shares_at(ranks.of_images.iter().copied().zip(weights.iter().copied())),
        shares_at(ranks.of_texts.iter().copied().zip(of_texts)),
    );
    Some(Recall { text_at: text_at?, image_at: image_at? })
}

/// How many wrong answers come before the best right one.
fn first_right_rank(scores: impl Iterator<Item = f32> + Clone, right: &[usize]) -> usize {
    let lowest = |score: f32| if score.is_nan() { f32::NEG_INFINITY } else { score };
    let best = scores
        .clone()
        .enumerate()
        .filter(|(index, _)| right.contains(index))
        .map(|(_, score)| lowest(score))
        .fold(f32::NEG_INFINITY, f32::max);
    scores.enumerate().filter(|(index, score)| lowest(*score) >= best && !right.contains(index)).count()
}

/// Shares of queries, given by rank and weight, whose rank is below 1, 5 and 10.
fn shares_at(queries: impl Iterator<Item = (usize, f64)>) -> Option<[f64; 3]> {
    let (mut hits, mut all) = ([0.0; 3], 0.0);
    for (rank, weight) in queries {
        all += weight;
        for (hit, k) in hits.iter_mut().zip([1, 5, 10]) {
            *hit += if rank < k { weight } else { 0.0 };
        }
    }
    (all > 0.0).then(|| hits.map(|hit| hit / all))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Each image once; a text as often as it has images.
    fn recall(text_scores: &[f32], image_scores: &[f32], relevance: &Relevance) -> Result<Recall, TrainerError> {
        let ranks = ranks(text_scores, image_scores, relevance)?;
        Ok(super::recall(&ranks, relevance, &vec![1.0; relevance.images()]).unwrap())
    }

    #[test]
    fn several_texts_an_image_count_once_by_their_best() {
        // Image 0 has texts 0 and 1; image 1 has text 2.
        let relevance = Relevance::new(vec![vec![0, 1], vec![2]], 3).unwrap();
        #[rustfmt::skip]
        let scores = [
            0.1, 0.9, 0.5,
            0.8, 0.2, 0.7,
        ];
        let got = recall(&scores, &scores, &relevance).unwrap();
        // Image 0 finds text 1 first; image 1 is beaten by text 0.
        assert_eq!(got.text_at, [0.5, 1.0, 1.0]);
        // Text 0 prefers image 1, texts 1 and 2 find their own.
        assert_eq!(got.image_at, [2.0 / 3.0, 1.0, 1.0]);
    }

    #[test]
    fn a_text_shared_by_two_images_is_right_for_both() {
        let relevance = Relevance::new(vec![vec![0], vec![0, 1]], 2).unwrap();
        let scores = [0.9, 0.1, 0.8, 0.2];
        let got = recall(&scores, &scores, &relevance).unwrap();
        assert_eq!(got.text_at, [1.0; 3]);
        assert_eq!(got.image_at, [1.0; 3]);
    }

    #[test]
    fn weights_count_images_and_their_texts() {
        let relevance = Relevance::new(vec![vec![0], vec![1], vec![1]], 2).unwrap();
        let ranks = Ranks { of_images: vec![0, 3, 7], of_texts: vec![0, 2] };
        let got = super::recall(&ranks, &relevance, &[2.0, 0.0, 1.0]).unwrap();
        assert_eq!(got.text_at, [2.0 / 3.0, 2.0 / 3.0, 1.0]);
        assert_eq!(got.image_at, [2.0 / 3.0, 1.0, 1.0]);
        assert_eq!(super::recall(&ranks, &relevance, &[0.0; 3]), None);
    }

    #[test]
    fn ties_and_nan_earn_nothing() {
        let relevance = Relevance::new((0..12).map(|i| vec![i]).collect(), 12).unwrap();
        for constant in [0.0, f32::NAN] {
            let scores = vec![constant; 144];
            let got = recall(&scores, &scores, &relevance).unwrap();
            assert_eq!(got.text_at, [0.0; 3]);
            assert_eq!(got.image_at, [0.0; 3]);
        }
    }

    #[test]
    fn ranks_are_cut_at_one_five_and_ten() {
        let texts = 20;
        let relevance = Relevance::new(vec![(0..texts).collect()], texts).unwrap();
        assert_eq!(recall(&[0.0; 20], &[0.0; 20], &relevance).unwrap().text_at, [1.0; 3]);
        // One image per text: text i is ranked i-th for every image.
        let relevance = Relevance::new((0..texts).map(|i| vec![i]).collect(), texts).unwrap();
        let scores: Vec<f32> = (0..texts).flat_map(|_| (0..texts).map(|t| -(t as f32))).collect();
        assert_eq!(recall(&scores, &scores, &relevance).unwrap().text_at, [0.05, 0.25, 0.5]);
    }

    #[test]
    fn misshapen_input_is_refused() {
        assert!(Relevance::new(vec![vec![]], 0).is_err());
        assert!(Relevance::new(vec![vec![1]], 1).is_err());
        assert!(Relevance::new(vec![vec![0]], 2).is_err());
        let relevance = Relevance::new(vec![vec![0]], 1).unwrap();
        assert!(recall(&[0.0, 1.0], &[0.0], &relevance).is_err());
    }
}
