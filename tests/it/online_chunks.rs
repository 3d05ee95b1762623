//! Which completions of a step are computed together: each prompt is computed once, and nothing
//! else changes.

use std::path::Path;

use temper::device::DType;
use temper::methods::online::chunks::{ChunkRow, chunks};
use temper::methods::online::grpo::GrpoConfig;
use temper::methods::online::ppo::PpoConfig;
use temper::methods::online::prompts::Prompts;
use temper::methods::online::rloo::RlooConfig;
use temper::methods::{BuildMethod, BuiltMethod, MethodRun, Metric};
use temper::train::{StepPlan, Trainer};

use crate::support::{MODEL, cpu_in, decoder, rows, with_inputs, words};

const REWARD: &str = "reward_funcs=regex:^[a-z]";

/// What one optimizer step gave.
struct OneStep {
    loss: f32,
    tokens: usize,
    metrics: Vec<Metric>,
    gradient: Vec<f32>,
    /// Tokens of each prompt of the generation.
    prompts: Vec<usize>,
}

/// The first step of a method on the fixture's model.
fn step<M: BuildMethod + Default + 'static>(keys: &str) -> OneStep {
    let keys = [words(keys), vec![REWARD.into(), "learning_rate=1e-3".into()]].concat();
    let (run, _) = MethodRun::<M>::load(None, &keys).unwrap();
    let cx = cpu_in(DType::F32);
    let data = rows("sft/prompt_completion.jsonl");
    let config = temper::model::folder::load_config(Path::new(MODEL)).unwrap();
    let (BuiltMethod { mut method, .. }, prompts) = with_inputs(&config, &data, |inputs| {
        let built = run.method.build(&run.training, inputs).unwrap();
        (built, Prompts::new(&run.training, inputs).unwrap())
    });
    let model = decoder(&cx, MODEL, method.longest());
    let plan = StepPlan::online(&run.training, method.micro_batches().unwrap()).unwrap();
    let mut trainer = Trainer::with_plan(cx, model, run.training.clone(), plan).unwrap();
    method.attach(&mut trainer.cx, &trainer.model).unwrap();
    let step = trainer.step(&mut *method).unwrap();
    let completions = method.take_completions().len();
    let group = 4;
    let taken = prompts.of_generation(0, completions / group);
    let params = trainer.model.trained();
    let gradient = (0..params.specs.len())
        .flat_map(|i| {
            params.state_view(&trainer.optimizer.grad, i).unwrap().unwrap().to_f32().unwrap()
        })
        .collect();
    OneStep {
        loss: step.loss,
        tokens: step.tokens,
        // What a step's time was spent on is no part of its result.
        metrics: step.metrics.into_iter().filter(|m| !m.0.starts_with("time/")).collect(),
        gradient,
        prompts: taken.into_iter().map(|p| prompts.train[p].ids.len()).collect(),
    }
}

/// Micro-batches as chunks: a quantile so near 1 that it masks no token, but it is asked for, and
/// then all tokens of a micro-batch are needed at once.
const OLD: &str = "top_entropy_quantile=0.999999999999999";

const COMMON: &str = "num_generations=4 per_device_train_batch_size=8 gradient_accumulation_steps=4 \
                      max_completion_length=60";

#[test]
fn groups_stay_together_and_loss_and_gradient_stay_the_same() {
    for loss in ["dapo", "grpo", "bnpo", "dr_grpo", "luspo importance_sampling_level=sequence"] {
        let keys = format!("{COMMON} loss_type={loss} beta=0.1 entropy_coef=0.01");
        let (new, old) = (step::<GrpoConfig>(&keys), step::<GrpoConfig>(&format!("{keys} {OLD}")));
        let metric = |name: &str| new.metrics.iter().find(|m| m.0 == name).unwrap().1;
        let (min, max) = (metric("completions/min_length"), metric("completions/max_length"));
        assert!(min < max, "{loss}: completions of one length have the same normalisers");
        // Metrics are of tokens, whose bits do not depend on what is computed beside them.
        assert_eq!(new.metrics, old.metrics, "{loss}");
        let largest = old.gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
        assert!(largest > 0.0, "{loss}: there is a gradient");
        let off = new.gradient.iter().zip(&old.gradient).map(|(a, b)| (a - b).abs());
        let off = off.fold(0f32, f32::max) / largest;
        // Sums of some thousand f32 products in two orders: each is off by about sqrt(1e3) * 2^-24
        // = 2e-6 of its terms, and the largest sum is no smaller than they are.
        assert!(off < 5e-6, "{loss}: gradients are {off:.1e} apart");
        let (a, b) = (f64::from(new.loss), f64::from(old.loss));
        assert!((a - b).abs() < 1e-6, "{loss}: {a} {b}: sums of terms below 1 in two orders");
        println!("{loss}: {off:.1e}, loss {a} {b}, tokens {} {}", new.tokens, old.tokens);
    }
}

#[test]
fn a_prompt_is_computed_once_a_step() {
    let new = step::<GrpoConfig>(COMMON);
    let old = step::<GrpoConfig>(&format!("{COMMON} {OLD}"));
    let mean = new.metrics.iter().find(|m| m.0 == "completions/mean_length").unwrap().1;
    let completions = 4 * new.prompts.len();
    // Each prompt without its last token; that goes in front of each of its completions.
    let shared: usize = new.prompts.iter().map(|n| n - 1).sum();
    let own = (mean * completions as f64).round() as usize + completions;
    assert_eq!(new.tokens, shared + own);
    assert!(old.tokens > new.tokens + shared, "{} {}", old.tokens, new.tokens);
}

#[test]
fn other_methods_divide_by_what_their_micro_batches_hold() {
    // RLOO's ratio is of a whole sequence, PPO's mean goes over the step: both may be computed in
    // any chunks, so a step of 4 x 8 rows and one of 1 x 32 are the same step.
    let common = "num_generations=4 max_completion_length=12";
    let cuts = [
        "per_device_train_batch_size=8 gradient_accumulation_steps=4",
        "per_device_train_batch_size=32 gradient_accumulation_steps=1",
    ];
    let runs = |name: &str, all: [OneStep; 2]| {
        let [a, b] = all;
        let largest = a.gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
        assert!(largest > 0.0, "{name}: there is a gradient");
        let off = a.gradient.iter().zip(&b.gradient).map(|(a, b)| (a - b).abs());
        let off = off.fold(0f32, f32::max) / largest;
        assert!(off < 5e-6, "{name}: gradients are {off:.1e} apart: as above");
        assert!((a.loss - b.loss).abs() < 1e-6, "{name}: {} {}", a.loss, b.loss);
    };
    runs("rloo", cuts.map(|cut| step::<RlooConfig>(&format!("{common} {cut}"))));
    runs("ppo", cuts.map(|cut| step::<PpoConfig>(&format!("{common} {cut} kl_coef=0.1"))));
}

#[test]
fn every_completion_is_in_one_chunk_whatever_the_sizes() {
    // Sizes of all kinds, some beyond the budget.
    let mut state = 12345u64;
    let mut below = |n: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    for budget in [1, 40, 100, 1000] {
        let prompts: Vec<usize> = (0..9).map(|_| below(60) as usize + 1).collect();
        let rows: Vec<ChunkRow> = (0..50)
            .map(|_| {
                let prompt = below(9) as usize;
                let tokens = below(70) as usize;
                ChunkRow { prompt, prompt_tokens: prompts[prompt], tokens }
            })
            .collect();
        let all = chunks(&rows, budget);
        let mut seen = all.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
        for chunk in &all {
            let groups: Vec<&[usize]> =
                chunk.chunk_by(|a, b| rows[*a].prompt == rows[*b].prompt).collect();
            let size = |g: &[usize]| {
                rows[g[0]].prompt_tokens - 1 + g.iter().map(|i| rows[*i].tokens + 1).sum::<usize>()
            };
            let total: usize = groups.iter().map(|g| size(g)).sum();
            assert!(total <= budget || chunk.len() == 1, "{total} of {budget}: {chunk:?}");
            for group in groups {
                let prompt = rows[group[0]].prompt;
                let whole: Vec<usize> = (0..50).filter(|i| rows[*i].prompt == prompt).collect();
                assert!(group.len() == whole.len() || size(&whole) > budget, "a group is cut");
            }
        }
    }
}
