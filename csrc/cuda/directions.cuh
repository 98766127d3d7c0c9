// Octets of directions: a pass requests several terms' before it waits for the first, and then uses one after the
// other.
#pragma once

#include "cuda/octets.cuh"

namespace crl {
namespace {

// The terms' octets at a place, for either kind of view. load(k) requests term k's; use(octet, k, f) returns
// f(elements), where elements[i] are Factor<Widest>.
template <class Widest, class Directions>
class Terms;

template <class Widest>
class Terms<Widest, View> {
 public:
  static constexpr int kAtOnce = 2;  // octets that a thread requests before it waits
  using Loaded = Octet<Widest>;

  __device__ Terms(const DeviceTable& table, const View& view, const Place& place)
      : table_(table), view_(view), place_(place) {}

  __device__ Loaded load(int k) const { return read<Widest, Caching::kKeep>(table_, view_, place_, k); }

  template <class Use>
  __device__ auto use(Loaded& octet, int, const Use& f) const {
    convert(octet);
    return f(octet);
  }

 private:
  const DeviceTable& table_;
  const View& view_;
  const Place& place_;
};

// Eight int8 elements of one block, q * scale. They become floating-point numbers without conversions, of which a
// multiprocessor does few: q + 128, one byte, is put into the last mantissa bits of a power of two, 2^20 in the upper
// half of a double or 2^23 in a float. All steps are exact, since a scale has at most 16 significant bits.
template <class Widest>
struct BlockOctet {
  uint32_t bits[2];
  Factor<Widest> scale, offset;

  __device__ BlockOctet(uint2 q, float scale_of_block)
      : bits{q.x ^ 0x80808080u, q.y ^ 0x80808080u}, scale(scale_of_block), offset(-(0x1p20 + 128) * scale) {}

  __device__ Factor<Widest> operator[](int i) const {
    constexpr bool kDouble = sizeof(Factor<Widest>) == 8;
    const uint32_t high = __byte_perm(bits[i / 4], kDouble ? 0x41300000u : 0x4b000000u, 0x7650 + i % 4);
    if constexpr (kDouble) return fma(__hiloint2double(high, 0), scale, offset);
    return (__uint_as_float(high) - (0x1p23f + 128)) * scale;
  }
};

template <class Widest>
struct StagedOctet {
  __device__ Factor<Widest> operator[](int i) const { return staged<Widest>(i); }
};

// Where a block holds whole octets, eight bytes and one scale are loaded for each.
template <class Widest>
class Terms<Widest, Int8View> {
 public:
  static constexpr int kAtOnce = 4;
  struct Loaded {
    uint2 q;
    float scale;  // NaN for octets that are not loaded yet
  };

  __device__ Terms(const DeviceTable& table, const Int8View& view, const Place& place)
      : table_(table), view_(view), place_(place) {
    const uint32_t length = static_cast<uint32_t>(__ldg(table.entries + view.octets + place.segment));
    if (place.in_one_segment && length != 0) {
      block_ = static_cast<uint32_t>((place.index - __ldg(table.begins + place.segment)) / kOctet) / length;
    }
  }

  __device__ Loaded load(int k) const {
    const int64_t* piece = piece_of(k, place_.segment);
    const Pointer first = pointer_of(__ldg(piece), place_.index);
    Loaded octet = {{}, __uint_as_float(0x7fffffff)};
    if (block_ != kNone && first.dtype == DType::kInt8 &&
        reinterpret_cast<uintptr_t>(first.data) % sizeof(uint2) == 0) {
      octet.q = crl::load<Caching::kKeep, uint2>(first.data);
      octet.scale = crl::load<Caching::kKeep, float>(scales_of(piece) + block_);
    }
    return octet;
  }

  template <class Use>
  __device__ auto use(const Loaded& octet, int k, const Use& f) const {
    constexpr float kLargest = 3.402823466e38f;  // NaN and infinity are for the other way
    if (fabsf(octet.scale) <= kLargest) return f(BlockOctet<Widest>(octet.q, octet.scale));
    stage(k);
    return f(StagedOctet<Widest>{});
  }

 private:
  __device__ const int64_t* piece_of(int k, int segment) const {
    const View& view = view_.pieces;
    return table_.entries + (view.first + segment * view.per_segment + k * view.per_term);
  }
  __device__ static const float* scales_of(const int64_t* piece) {
    return reinterpret_cast<const float*>(__ldg(piece + 1));
  }

  // An octet of any dtypes, anywhere.
  __device__ void stage(int k) const {
    int current = -1;  // segment, and of an int8 one the scale, and how many elements of its block are left
    Pointer element = {};
    const float* scale = nullptr;
    int length = 0, left = 0;  // 8 for more
    table_.for_each_element(place_, [&](int i, int segment, int64_t index) {
      Widest value = 0;
      if (segment >= 0) {
        if (segment != current) {
          const int64_t* piece = piece_of(k, segment);
          element = pointer_of(__ldg(piece), index);
          if (element.dtype == DType::kInt8) {
            const uint64_t first = index - __ldg(table_.begins + segment), whole = __ldg(piece + 2);
            const uint64_t block = first / whole, rest = (block + 1) * whole - first;
            scale = scales_of(piece) + block;
            length = static_cast<int>(whole < kOctet ? whole : kOctet);
            left = static_cast<int>(rest < kOctet ? rest : kOctet);
          }
          current = segment;
        }
        if (element.dtype == DType::kInt8) {
          value = crl::load<Caching::kKeep, signed char>(element.data) * crl::load<Caching::kKeep, float>(scale);
          if (--left == 0) {
            ++scale;
            left = length;
          }
        } else {
          value = load_element<Widest, Caching::kKeep>(element);
        }
        element.data = static_cast<char*>(element.data) + size_of(element.dtype);
      }
      staged<Widest>(i) = value;
    });
  }

  const DeviceTable& table_;
  const Int8View& view_;
  const Place& place_;
  static constexpr uint32_t kNone = ~0u;
  uint32_t block_ = kNone;
};

}  // namespace
}  // namespace crl
