//! Completions of prompts, scored by verifiers: mean rewards and pass@k. Layer 6.
//!
//! Invariant: prompts, stop ids and rewards are those of online RL; every row counts in a metric or
//! as skipped.

use serde_json::{Map, json};

use super::options::EvalOptions;
use super::result::{EvalMetric, EvalRow, Evaluation, SkippedRows};
use crate::autograd::Cx;
use crate::data::bad::BadRows;
use crate::data::render::ModelText;
use crate::data::rows::Row;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::rewards::{RewardBatch, Rewards, Scores};
use crate::rollout::{Engine, EngineOptions, Request};

/// Generates `n` completions for every prompt and scores them with `reward_funcs`. Errors: a reward
/// skips every row; all completions of a prompt would be the same.
pub fn answers(
    cx: &mut Cx,
    model: &mut Decoder,
    text: &ModelText,
    rows: &[Row],
    options: &EvalOptions,
) -> Result<Evaluation> {
    options.check()?;
    let n = options.generate.n;
    let mut rewards = Rewards::parse(&options.eval.reward_funcs, None)?;
    let tokenizer = &text.tokenizer;
    let renderer = text.renderer(model.config.vocab_size);
    let mut bad = BadRows::new(options.data.on_bad_row);
    let good = bad.filter(rows, |row| Ok(renderer.prompt(row)?.ids))?;
    let (rows, prompts): (Vec<&Row>, Vec<_>) = good.into_iter().unzip();
    rewards.columns(rows.iter().map(|row| &row.value))?;
    let requests = Request::numbered(prompts, n);
    let longest = Request::longest(&requests) + options.generate.max_new_tokens;
    let batch = options.batch.clamp(1, (rows.len() * n).max(1));
    let engine = EngineOptions::of(&options.generate, &model.config, tokenizer, batch)?;
    let completions = Engine::new(cx, model, engine, longest)?.generate(cx, model, &requests)?;

    let mut batch = RewardBatch::default();
    for c in completions {
        let row = &rows[c.request];
        let columns = row.value.iter().filter(|(name, _)| *name != "prompt");
        batch.push(row.need("prompt")?, columns, &tokenizer.decode(&c.ids, true)?, c.ids);
    }
    let scores = rewards.score(&batch, &*cx.observer)?;
    let (metrics, skipped) = metrics(&scores, n, options.eval.pass_score)?;
    let row = |i: usize| {
        let own = i * n..(i + 1) * n;
        let each = scores.names.iter().zip(&scores.each);
        let rewards: Map<_, _> =
            each.map(|(name, s)| (name.clone(), json!(s[own.clone()]))).collect();
        let completions = own.map(|c| batch.completion_text(c)).collect();
        EvalRow::Answers { prompt: batch.prompts[i * n].clone(), completions, rewards }
    };
    Ok(Evaluation { metrics, rows: (0..rows.len()).map(row).collect(), skipped, bad })
}

/// For each reward, over rows of `n` completions: the mean, and pass@k for powers of two and `n`.
fn metrics(
    scores: &Scores,
    n: usize,
    pass_score: f64,
) -> Result<(Vec<EvalMetric>, Vec<SkippedRows>)> {
    let (mut metrics, mut skipped) = (Vec::new(), Vec::new());
    for (name, each) in scores.names.iter().zip(&scores.each) {
        // If the verifier skips a completion, all completions of the row are skipped.
        let known: Vec<Vec<f64>> =
            each.chunks(n).filter_map(|row| row.iter().copied().collect()).collect();
        if known.is_empty() {
            return Err(Error::Run(format!(
                "reward `{name}` skipped every row; check that its column holds an answer"
            )));
        }
        let rows = each.len() / n - known.len();
        if rows > 0 {
            skipped.push(SkippedRows { reward: name.clone(), rows });
        }
        let means: Vec<f64> = known.iter().map(|row| row.iter().sum::<f64>() / n as f64).collect();
        metrics.push(EvalMetric::mean(name, &means));
        let powers =
            std::iter::successors(Some(1), |k| Some(k * 2)).take_while(|k| *k < n).chain([n]);
        for k in powers.filter(|_| n > 1) {
            let passed =
                |row: &Vec<f64>| pass_at_k(n, row.iter().filter(|s| **s >= pass_score).count(), k);
            let values: Vec<f64> = known.iter().map(passed).collect();
            metrics.push(EvalMetric::mean(format!("{name}/pass@{k}"), &values));
        }
    }
    Ok((metrics, skipped))
}

/// The probability that at least one of `k` completions is right, if they are drawn from `n` of
/// which `right` are right (Chen et al., 2021).
pub fn pass_at_k(n: usize, right: usize, k: usize) -> f64 {
    if n - right < k {
        return 1.0;
    }
    1.0 - (n - right + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

#[cfg(test)]
mod tests {
    use super::pass_at_k;

    #[test]
    fn pass_at_k_is_the_share_of_draws_with_a_right_one() {
        // Enumerates all ways to draw k of n completions.
        for n in 1..9usize {
            for right in 0..=n {
                for k in 1..=n {
                    let draws = (0u32..1 << n).filter(|set| set.count_ones() as usize == k);
                    let (mut all, mut hit) = (0, 0);
                    for set in draws {
                        all += 1;
                        hit += u32::from(set & ((1 << right) - 1) != 0);
                    }
                    let want = f64::from(hit) / f64::from(all);
                    assert!(
                        (pass_at_k(n, right, k) - want).abs() < 1e-12,
                        "n {n}, right {right}, k {k}"
                    );
                }
            }
        }
    }
}
