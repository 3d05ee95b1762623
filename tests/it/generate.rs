//! Generation over the paged cache against the trainer's forward.

use std::sync::Arc;

use temper::cx::Cx;
use temper::device::{DType, cpu::Cpu};
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::rollout::sample::Sampling;
use temper::rollout::{Finish, Options, generate};

fn options(temperature: f64, batch: usize) -> Options {
    let sampling = Sampling { temperature, seed: 3, ..Sampling::greedy() };
    Options { max_new_tokens: 40, sampling, stop: vec![5], batch }
}

#[test]
fn log_probs_of_the_rollout_are_the_trainers_bit_for_bit_in_any_batch() {
    for (case, dtype) in
        [("llama_gqa", DType::F32), ("qwen3", DType::F32), ("mistral_window", DType::F32), ("qwen2", DType::BF16)]
    {
        let mut cx = Cx::new(Arc::new(Cpu::new()), dtype).unwrap();
        let mut model = Decoder::load(&cx, 0, format!("tests/fixtures/models/{case}"), 16).unwrap();
        let prompts: Vec<Vec<u32>> =
            (0..7).map(|i| (0..3 + i * 5).map(|t| (t * 7 + i * 11) as u32 % 90 + 6).collect()).collect();
        let together = generate(&mut cx, &mut model, &prompts, &options(0.9, 3), |_, _| {}).unwrap();
        let mut stopped = 0;
        for (prompt, completion) in prompts.iter().zip(&together) {
            stopped += usize::from(completion.finish == Finish::Stop);
            let ids: Vec<u32> = prompt.iter().chain(&completion.ids).copied().collect();
            let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
            let scored = model.logps(&mut cx, &[Sequence { ids: &ids, target: Some(&target) }]).unwrap();
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&scored[0]), bits(&completion.logps), "{case}");
        }
        assert!(stopped < prompts.len(), "{case}: some completions go to the limit");
        // A sequence's tokens do not depend on its neighbours: the same with all prompts in one batch.
        let wide = generate(&mut cx, &mut model, &prompts, &options(0.9, 7), |_, _| {}).unwrap();
        for (a, b) in together.iter().zip(&wide) {
            assert_eq!((&a.ids, &a.logps), (&b.ids, &b.logps), "{case}");
        }
    }
}
