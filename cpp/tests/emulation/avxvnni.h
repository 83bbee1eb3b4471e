// Lets the avxvnni level compile for AVX2, its dot product done by SIMDe: the compiler includes this file before it.
#pragma once
#include <immintrin.h>
#include <simde/x86/avx512/dpbusd.h>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
