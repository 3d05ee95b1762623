//! Computes the merges of a sentencepiece BPE from the scores of its tokens, and scores from
//! merges. Layer 6.
//!
//! Invariant: the merges are those that transformers computes from the same scores. Scores that
//! would not reproduce a tokenizer's merges are refused.

use std::collections::HashMap;

/// The kinds of tokens, as GGUF numbers them.
pub mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Every way to merge two tokens into a normal token, the best score first; for equal scores the
/// longer left part first. None: the scores carry no information, because there are merges and all
/// scores are equal.
pub fn merges_of<'a>(
    tokens: &[&'a str],
    kinds: &[i32],
    scores: &[f32],
) -> Option<Vec<[&'a str; 2]>> {
    let normal = |id: usize| kinds[id] == kind::NORMAL;
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|(id, _)| normal(*id)).map(|(id, t)| (*t, id)).collect();
    let mut merges: Vec<(f32, [&str; 2])> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| normal(*id)) {
        let mut ways: Vec<(usize, usize, [&str; 2])> = Vec::new();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                ways.push((*l, *r, [left, right]));
            }
        }
        ways.sort_by_key(|(l, r, _)| (*l, *r));
        merges.extend(ways.into_iter().map(|(_, _, way)| (scores[id], way)));
    }
    let chars = |text: &str| text.chars().count();
    merges.sort_by(|(a, x), (b, y)| {
        b.total_cmp(a)
            .then_with(|| chars(y[0]).cmp(&chars(x[0])))
            .then_with(|| chars(y[1]).cmp(&chars(x[1])))
    });
    let same = merges.first().zip(merges.last()).is_some_and(|(a, b)| a.0 == b.0);
    if same && merges.len() > 1 {
        return None;
    }
    Some(merges.into_iter().map(|(_, way)| way).collect())
}

/// Scores from which [`merges_of`] reproduces `merges`: the score of a token is minus the position
/// of its first merge. None: no scores do.
pub fn scores_of(tokens: &[&str], kinds: &[i32], merges: &[[&str; 2]]) -> Option<Vec<f32>> {
    let mut places: HashMap<String, usize> = HashMap::new();
    for [left, right] in merges {
        let next = places.len();
        places.entry(format!("{left}{right}")).or_insert(next);
    }
    let last = places.len();
    let score = |token: &&str| -(*places.get(*token).unwrap_or(&last) as f32);
    let scores: Vec<f32> = tokens.iter().map(score).collect();
    // The ways to merge a token matter only as a set: no two of them begin at the same place of a
    // text.
    let ways = |merges: &[[&str; 2]]| {
        let mut out: Vec<(String, Vec<String>)> = Vec::new();
        for [left, right] in merges {
            let token = format!("{left}{right}");
            match out.last_mut() {
                Some((made, ways)) if *made == token => ways.push(left.to_string()),
                _ => out.push((token, vec![left.to_string()])),
            }
        }
        out.iter_mut().for_each(|(_, ways)| ways.sort());
        out
    };
    let back = merges_of(tokens, kinds, &scores)?;
    (ways(&back) == ways(merges)).then_some(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [&str; 7] = ["<unk>", "a", "b", "c", "ab", "bc", "abc"];
    const KINDS: [i32; 7] = [kind::UNKNOWN, 1, 1, 1, 1, 1, 1];

    #[test]
    fn merges_stand_by_score_and_by_the_longer_left_part() {
        let scores = [0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0];
        let merges = merges_of(&TOKENS, &KINDS, &scores).unwrap();
        assert_eq!(merges, [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]);
        let back = scores_of(&TOKENS, &KINDS, &merges).unwrap();
        assert_eq!(merges_of(&TOKENS, &KINDS, &back).unwrap(), merges);
    }

    #[test]
    fn scores_that_say_nothing_are_refused() {
        assert_eq!(merges_of(&TOKENS, &KINDS, &[0.0; 7]), None);
        // Scores cannot represent a tokenizer that lacks one of the ways.
        assert_eq!(scores_of(&TOKENS, &KINDS, &[["b", "c"], ["a", "b"], ["ab", "c"]]), None);
    }
}
