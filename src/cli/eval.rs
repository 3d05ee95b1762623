//! `temper eval`: how good a model is on rows. Layer 9.
//!
//! Invariant: the rows say what is measured: prompts are answered and verified, texts give a
//! perplexity, pairs give the accuracy of a reward model. No row is left out of a figure without
//! being counted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::autograd::Cx;
use crate::cli::generate::{engine_options, prompt_ids};
use crate::cli::score::{batches, sequence_scores, tokenise};
use crate::cli::{Where, part_keys};
use crate::config::{self, EvalConfig, GenerateConfig, Section};
use crate::data::chat::ChatTemplate;
use crate::data::format::Format;
use crate::data::preference::{PairStyle, PreferenceOptions, pairs};
use crate::data::rows::{Row, read_rows};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::offline::reward::one_score;
use crate::model::batch::Sequence;
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::layout::Task;
use crate::model::open::open_model;
use crate::rewards::{Batch, Rewards};
use crate::rollout::{Engine, Request};

/// Figures of a model: right answers (pass@k) on prompts, perplexity on texts, accuracy of a reward
/// model on pairs
#[derive(clap::Args)]
pub struct Args {
    /// model folder, or a hub name in the local cache
    #[arg(long)]
    model: String,
    /// adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// .jsonl, .json or .parquet files: prompt and an answer column; text, messages or prompt and
    /// completion; chosen and rejected
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// a JSON file with the figures and what each row gave
    #[arg(long)]
    output: Option<PathBuf>,
    /// sequences decoded at once
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// tokens in one forward, where nothing is generated
    #[arg(long, default_value_t = 4096)]
    batch_tokens: usize,
    #[command(flatten)]
    on: Where,
    /// key=value: reward_funcs, pass_score, n, temperature (0, the default: greedy),
    /// max_new_tokens, and generate's others
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

/// A number with the standard error of its mean over the rows, where it is one.
struct Figure {
    name: String,
    value: f64,
    stderr: Option<f64>,
    rows: usize,
}

/// The figures, and a line for each row.
type Found = (Vec<Figure>, Vec<Value>);

pub fn run(mut args: Args) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let mut keys = EvalConfig::default();
    let mut draws = GenerateConfig::default();
    draws.sampling.temperature = 0.0;
    for note in config::load(&mut [&mut keys, &mut draws], None, &args.keys)? {
        eprintln!("note: {note}");
    }
    if draws.n > 1 && draws.sampling.temperature == 0.0 {
        let n = draws.n;
        return Err(Error::Config(format!(
            "n = {n} with temperature = 0: all {n} would be the same; set temperature=1"
        )));
    }
    let dir = resolve_model(&args.model)?;
    let rows = read_rows(&args.data)?;
    let format = Format::detect(&rows[0], &keys.dataset_text_field)?;
    let mut cx = args.on.open()?;
    let mut model = open_model(&cx, &dir, args.adapter.as_deref())?;
    match format {
        Format::Preference => one_score(&model.config)?,
        _ if model.config.task != Task::CausalLm => {
            let message =
                "is no language model; a classifier is evaluated on rows with chosen and rejected";
            return Err(Error::model(&dir, message));
        }
        _ => {}
    }
    let (figures, lines) = match format {
        Format::Preference => preferences(&mut cx, &mut model, &dir, &rows, args.batch_tokens)?,
        Format::PromptOnly => answers(&mut cx, &mut model, &dir, &rows, &keys, &draws, args.batch)?,
        _ => perplexity(
            &mut cx,
            &mut model,
            &dir,
            &rows,
            &keys.dataset_text_field,
            args.batch_tokens,
        )?,
    };
    let width = figures.iter().map(|f| f.name.len()).max().unwrap_or(0);
    for f in &figures {
        let error = f.stderr.map(|e| format!(" ± {e:.4}")).unwrap_or_default();
        println!("{:<width$}  {:>9.4}{error}  ({} rows)", f.name, f.value, f.rows);
    }
    let Some(path) = &args.output else { return Ok(()) };
    let figure = |f: &Figure| {
        (f.name.clone(), json!({ "value": f.value, "stderr": f.stderr, "rows": f.rows }))
    };
    let given = |section: &dyn Section| -> Map<String, Value> {
        section.keys().into_iter().map(|k| (k.name.to_string(), json!(k.value))).collect()
    };
    let mut all = given(&keys);
    all.extend(given(&draws));
    let report = json!({
        "model": args.model, "adapter": args.adapter, "data": args.data, "keys": all,
        "figures": figures.iter().map(figure).collect::<Map<_, _>>(), "rows": lines,
    });
    fsio::atomic_write(path, format!("{report:#}\n").as_bytes()).map(drop)
}

/// Completions of every prompt, scored by the verifiers.
fn answers(
    cx: &mut Cx,
    model: &mut Decoder,
    dir: &Path,
    rows: &[Row],
    keys: &EvalConfig,
    draws: &GenerateConfig,
    batch: usize,
) -> Result<Found> {
    let mut rewards = Rewards::parse(&keys.reward_funcs, None)?;
    let tokenizer = Arc::new(Tokenizer::load(dir)?);
    let n = draws.n;
    let request = |(i, row): (usize, &Row)| {
        Ok(Request { prompt: prompt_ids(row, &tokenizer)?, n, number: (i * n) as u32 })
    };
    let requests = rows.iter().enumerate().map(request).collect::<Result<Vec<_>>>()?;
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0) + draws.max_new_tokens;
    let options = engine_options(draws, model, &tokenizer, dir, batch.clamp(1, rows.len() * n))?;
    let completions = Engine::new(cx, model, options, longest)?.generate(cx, model, &requests)?;

    let mut of = Batch::default();
    let columns = rows[0].value.keys().filter(|k| *k != "prompt");
    for name in columns {
        let cells =
            rows.iter().flat_map(|row| vec![row.get(name).cloned().unwrap_or(Value::Null); n]);
        of.columns.insert(name.clone(), Value::Array(cells.collect()));
    }
    for c in completions {
        let prompt = rows[c.request].need("prompt")?.clone();
        let text = tokenizer.decode(&c.ids, true)?;
        of.completions.push(match prompt {
            Value::Array(_) => json!([{ "role": "assistant", "content": text }]),
            _ => json!(text),
        });
        of.prompts.push(prompt);
        of.completion_ids.push(c.ids);
    }
    let scores = rewards.score(&of)?;
    let mut figures = Vec::new();
    for (name, each) in scores.names.iter().zip(&scores.each) {
        // a row that the verifier skips is skipped with all of its completions
        let known: Vec<Vec<f64>> =
            each.chunks(n).filter_map(|row| row.iter().copied().collect()).collect();
        if known.is_empty() {
            return Err(Error::Run(format!(
                "reward `{name}` skipped every row; has its column an answer?"
            )));
        }
        if known.len() < rows.len() {
            eprintln!(
                "note: {name} skipped {} of {} rows (no answer there)",
                rows.len() - known.len(),
                rows.len()
            );
        }
        figures.push(mean(
            name.clone(),
            known.iter().map(|row| row.iter().sum::<f64>() / n as f64).collect(),
        ));
        let powers =
            std::iter::successors(Some(1), |k| Some(k * 2)).take_while(|k| *k < n).chain([n]);
        for k in powers.filter(|_| n > 1) {
            let passed = |row: &Vec<f64>| {
                pass_at_k(n, row.iter().filter(|s| **s >= keys.pass_score).count(), k)
            };
            figures.push(mean(format!("{name}/pass@{k}"), known.iter().map(passed).collect()));
        }
    }
    let line = |i: usize| {
        let own = i * n..(i + 1) * n;
        let each = scores
            .names
            .iter()
            .zip(&scores.each)
            .map(|(name, s)| (name.clone(), json!(s[own.clone()])));
        let said: Vec<String> = own.clone().map(|c| of.completion_text(c)).collect();
        json!({ "prompt": of.prompts[i * n], "completions": said, "rewards": each.collect::<Map<_, _>>() })
    };
    Ok((figures, (0..rows.len()).map(line).collect()))
}

/// The probability that of `k` completions, drawn from `n` of which `right` are right, one is right
/// (Chen et al., 2021).
fn pass_at_k(n: usize, right: usize, k: usize) -> f64 {
    if n - right < k {
        return 1.0;
    }
    1.0 - (n - right + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

fn mean(name: String, values: Vec<f64>) -> Figure {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let stderr = (values.len() > 1).then(|| (variance / n).sqrt());
    Figure { name, value: mean, stderr, rows: values.len() }
}

/// Of the tokens that SFT would train on: mean negative log-likelihood and its exponential.
fn perplexity(
    cx: &mut Cx,
    model: &mut Decoder,
    dir: &Path,
    rows: &[Row],
    text_field: &str,
    limit: usize,
) -> Result<Found> {
    let examples = tokenise(rows, dir, model.config.vocab_size, text_field)?;
    let lengths: Vec<usize> = examples.iter().map(|e| e.0.len()).collect();
    model.ensure_positions(cx, lengths.iter().copied().max().unwrap_or(1))?;
    let (mut nll, mut tokens, mut lines) = (0f64, 0, Vec::new());
    for range in batches(&lengths, limit) {
        let sequences: Vec<Sequence> = examples[range]
            .iter()
            .map(|(ids, mask)| Sequence { ids, target: mask.as_deref() })
            .collect();
        for logps in model.logps(cx, &sequences)? {
            let sum = -logps.iter().map(|l| f64::from(*l)).sum::<f64>();
            (nll, tokens) = (nll + sum, tokens + logps.len());
            lines.push(json!({ "nll": sum, "tokens": logps.len() }));
        }
    }
    if tokens == 0 {
        return Err(Error::data(&rows[0].file, None, "no row has a token to predict"));
    }
    let loss = nll / tokens as f64;
    let figure = |name: &str, value: f64| Figure {
        name: name.into(),
        value,
        stderr: None,
        rows: rows.len(),
    };
    let figures = vec![
        figure("loss", loss),
        figure("perplexity", loss.exp()),
        figure("tokens", tokens as f64),
    ];
    Ok((figures, lines))
}

/// How often a reward model scores the chosen side above the rejected one.
fn preferences(
    cx: &mut Cx,
    model: &mut Decoder,
    dir: &Path,
    rows: &[Row],
    limit: usize,
) -> Result<Found> {
    let tokenizer = Tokenizer::load(dir)?;
    let template = tokenizer.chat_template().map(|_| ChatTemplate::of(&tokenizer)).transpose()?;
    let options = PreferenceOptions { max_length: None, ..PreferenceOptions::default() };
    let vocab = model.config.vocab_size;
    let (examples, _) =
        pairs(rows, &tokenizer, template.as_ref(), vocab, PairStyle::Reward, &options)?;
    let sides: Vec<&[u32]> = examples
        .iter()
        .flat_map(|e| [e.chosen.input_ids.as_slice(), e.rejected.input_ids.as_slice()])
        .collect();
    let lengths: Vec<usize> = sides.iter().map(|s| s.len()).collect();
    model.ensure_positions(cx, lengths.iter().copied().max().unwrap_or(1))?;
    let mut scores = Vec::with_capacity(sides.len());
    for range in batches(&lengths, limit) {
        let sequences: Vec<Sequence> =
            sides[range].iter().map(|ids| Sequence { ids, target: None }).collect();
        scores.extend(sequence_scores(cx, model, &sequences)?);
    }
    let pairs = scores.chunks_exact(2);
    let lines = pairs.clone().map(|s| json!({ "chosen": s[0], "rejected": s[1] })).collect();
    let won =
        mean("accuracy".into(), pairs.clone().map(|s| f64::from(u8::from(s[0] > s[1]))).collect());
    let margin = mean("margin".into(), pairs.map(|s| f64::from(s[0]) - f64::from(s[1])).collect());
    Ok((vec![won, margin], lines))
}

#[cfg(test)]
mod tests {
    use super::pass_at_k;

    #[test]
    fn pass_at_k_is_the_share_of_draws_with_a_right_one() {
        // every draw of k of n completions, counted
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
