// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator. Key: (seed,
// stream). Counter: what the number is for (step, site, row, position). There is no state to checkpoint, and a number does not
// depend on which thread computes it.
#pragma once
#include "prim/kernel.cuh"

// The use of a random number, in the last word of the counter, so that no two uses share a number. The other tags are in
// src/rng.rs, where a test checks that all are distinct. The low bits of DROPOUT_TAG hold the site.
EXPORT(unsigned, DROPOUT_TAG, 0x01000000u);
EXPORT(unsigned, WEIGHT_NOISE_TAG, 0x02000000u);
EXPORT(unsigned, SAMPLE_TAG, 0x04000000u);
EXPORT(unsigned, M_NOISE_TAG, 0x06000000u);
EXPORT(unsigned, V_NOISE_TAG, 0x07000000u);

struct Philox {
  unsigned x, y, z, w;
};

DEVICE unsigned mul_hi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }

DEVICE Philox philox(unsigned key0, unsigned key1, unsigned c0, unsigned c1, unsigned c2, unsigned c3) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    unsigned h0 = mul_hi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    unsigned h1 = mul_hi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ key0;
    c1 = l1;
    c2 = h0 ^ c3 ^ key1;
    c3 = l0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// A uniform number in (0, 1) from 24 of the 32 bits.
DEVICE float uniform(unsigned u) { return ((float)(u >> 8) + 0.5f) * 5.9604644775390625e-8f; }
