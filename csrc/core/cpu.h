// Which instructions this processor offers, and which of them we use. Not here: the code for each (ops/*.simd.cpp).
#pragma once

namespace lilliput {

enum class Isa { portable, avx2, avx512, avx512vnni };  // each offers what those before it do

// What the processor and the operating system support, at most what we have code for.
Isa supported_isa();

// What we run on: the best supported one, or LILLIPUT_ISA=portable|avx2|avx512|avx512vnni (read once; throws
// std::runtime_error for another name or for one that this processor lacks).
Isa chosen_isa();

const char* isa_name(Isa isa);

}  // namespace lilliput
