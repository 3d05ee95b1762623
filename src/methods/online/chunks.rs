//! Which completions are computed together. Layer 7.
//!
//! A *chunk* is one forward and backward. It is not TRL's micro-batch: the micro-batch defines the
//! divisor of a token's weight, which is known before the first forward. A chunk may therefore
//! contain completions of any micro-batches of a step, which changes the rounding of sums and
//! nothing else.
//!
//! Invariant: a chunk has at most its budget of tokens, or one completion; the completions of a
//! prompt are adjacent, and a group that fits into a chunk is never split, so its prompt is
//! computed once.

use super::buffer::RolloutSchedule;

/// The sizes of a completion.
#[derive(Clone, Copy, Debug)]
pub struct ChunkRow {
    /// The prompt that it continues.
    pub prompt: usize,
    /// Tokens of the prompt, including the virtual ones of prompt tuning.
    pub prompt_tokens: usize,
    /// Tokens of the completion.
    pub tokens: usize,
}

impl ChunkRow {
    /// Rows of the prompt that its completions share: all but the last token (`Batch::grouped`).
    fn shared(&self) -> usize {
        self.prompt_tokens.saturating_sub(1)
    }

    /// Rows that are not shared: the prompt's last token, and the completion.
    fn own(&self) -> usize {
        self.tokens + 1
    }
}

/// Tokens of a chunk: those of `per_device_train_batch_size` completions of maximal length. If
/// groups are whole in a step, the completions of a prompt share it.
pub fn token_budget(
    schedule: &RolloutSchedule,
    longest_prompt: usize,
    longest_completion: usize,
    whole_groups: bool,
) -> usize {
    let prompts = match whole_groups {
        true => schedule.batch.div_ceil(schedule.group),
        false => schedule.batch,
    };
    prompts * longest_prompt.saturating_sub(1) + schedule.batch * (longest_completion + 1)
}

/// Cuts completions into chunks of at most `budget` tokens. Returns the indices in each chunk, with
/// the completions of a prompt adjacent. Each group goes into the first chunk with room for it.
pub fn chunks(rows: &[ChunkRow], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|i| rows[*i].prompt);
    let mut chunks: Vec<(usize, Vec<usize>)> = Vec::new();
    for group in order.chunk_by(|a, b| rows[*a].prompt == rows[*b].prompt) {
        for (tokens, piece) in pieces(rows, group, budget) {
            match chunks.iter_mut().find(|chunk| chunk.0 + tokens <= budget) {
                Some(chunk) => {
                    chunk.0 += tokens;
                    chunk.1.extend(piece);
                }
                None => chunks.push((tokens, piece)),
            }
        }
    }
    chunks.into_iter().map(|chunk| chunk.1).collect()
}

/// A group as a whole, or in pieces that each fit into a chunk.
fn pieces(rows: &[ChunkRow], group: &[usize], budget: usize) -> Vec<(usize, Vec<usize>)> {
    let mut pieces: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in group {
        let own = rows[*i].own();
        match pieces.last_mut() {
            Some(piece) if piece.0 + own <= budget => {
                piece.0 += own;
                piece.1.push(*i);
            }
            _ => pieces.push((rows[*i].shared() + own, vec![*i])),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: usize, prompt_tokens: usize, tokens: usize) -> ChunkRow {
        ChunkRow { prompt, prompt_tokens, tokens }
    }

    fn size(rows: &[ChunkRow], chunk: &[usize]) -> usize {
        let groups = chunk.chunk_by(|a, b| rows[*a].prompt == rows[*b].prompt);
        groups.map(|g| rows[g[0]].shared() + g.iter().map(|i| rows[*i].own()).sum::<usize>()).sum()
    }

    #[test]
    fn a_group_that_fits_is_not_cut_and_a_chunk_keeps_its_budget() {
        // Interleaved as in a shuffled generation: 64 prompts of 245 tokens, 16 completions of 256
        // each.
        let rows: Vec<ChunkRow> = (0..1024).map(|i| row(i * 7 % 64, 245, 256)).collect();
        let schedule = RolloutSchedule {
            batch: 32,
            accumulation: 32,
            micro_batches: 32,
            passes: 1,
            group: 16,
            prompts: 64,
        };
        let budget = token_budget(&schedule, 245, 256, true);
        assert_eq!(budget, 2 * 244 + 32 * 257);
        let all = chunks(&rows, budget);
        assert_eq!(all.len(), 32, "two whole groups each");
        assert!(all.iter().all(|chunk| size(&rows, chunk) == budget));
        let mut seen: Vec<usize> = all.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..1024).collect::<Vec<_>>(), "each completion once");
    }

    #[test]
    fn short_completions_fill_chunks_and_large_groups_are_cut() {
        // Half as long: twice as many per chunk.
        let short: Vec<ChunkRow> = (0..64).map(|i| row(i / 8, 11, 9)).collect();
        assert_eq!(chunks(&short, 180).len(), 4);
        // A group of 300 tokens in chunks of 100: it is split, and the rest shares a chunk.
        let large: Vec<ChunkRow> = (0..30).map(|i| row(i / 15, 11, 19)).collect();
        let all = chunks(&large, 100);
        assert!(all.iter().all(|chunk| size(&large, chunk) <= 100));
        assert_eq!(all.iter().map(Vec::len).sum::<usize>(), 30);
        // One completion may be longer than the budget.
        assert_eq!(chunks(&[row(0, 50, 60), row(1, 5, 6)], 100), [vec![0], vec![1]]);
    }
}
