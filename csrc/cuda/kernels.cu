// The kernels of one dtype, ALPHACL_DTYPE (a name of `Dtype`); compiled once for each.
#include "hopper.h"
#include "launch.h"
#include "rows.h"
#include "sweeps.h"

namespace alphacl {

template <Dtype> struct Engines;
template <> struct Engines<BFLOAT16> {
  template <int K> using Engine = Half<K, true>;
  using Row = Bfloat16;
};
template <> struct Engines<FLOAT16> {
  template <int K> using Engine = Half<K, false>;
  using Row = Float16;
};
template <> struct Engines<TFLOAT32> {
  template <int K> using Engine = Tf32<K>;
  using Row = float;
};
template <> struct Engines<FLOAT32> {
  template <int K> using Engine = Simt<float, K>;
  using Row = float;
};
template <> struct Engines<FLOAT64> {
  template <int K> using Engine = Simt<double, K>;
  using Row = double;
};

template <class K> const char* start(const Sweep& a, int rows, void* stream) {
  return device::launch<K>(rows, a.parts, K::SHARED, a, stream);
}

template <class E, bool CHUNKS> const char* sums(const Sweep& a, int rows, void* stream) {
  if constexpr (E::TENSOR_CORES) {
    const int32_t known = (a.row_of_term[TERM_F] >= 0) + (a.row_of_term[TERM_FT] >= 0);
    if (a.form == FIXED && is_fast(a) && !a.bias && a.row_of_term[TERM_F] >= 0 && known == a.terms) {
      if constexpr (E::BOTH_SIDES && !CHUNKS) {
        if (const auto started = hopper::row_sums<E::K>(a, rows, stream)) return *started;
      }
      if (!(a.flags & BOTH)) return start<FastRowSums<E, CHUNKS, false>>(a, rows, stream);
      if constexpr (E::BOTH_SIDES) return start<FastRowSums<E, CHUNKS, true>>(a, rows, stream);
    }
  }
  if ((a.flags & BOTH) && a.form == RUNNING) return "the running form has no both-sides form";
  return start<RowSums<E, CHUNKS>>(a, rows, stream);
}

template <class E, bool CHUNKS> const char* gradient(const Sweep& a, int rows, void* stream) {
  if (a.gradient != NO_GRADIENT && a.gradient != (CHUNKS ? WEIGHTS : PRODUCT)) return "rows of this length take the other gradient";
  if (a.flags & BOTH) return "pair_grad has no both-sides form";
  if constexpr (E::TENSOR_CORES) {
    if (a.form == FIXED && is_fast(a) && !a.bias && !a.terms && !a.w_sums && a.weight == WEIGHT_F && a.gradient != NO_GRADIENT) {
      if constexpr (E::BOTH_SIDES && !CHUNKS) {
        if (const auto started = hopper::pair_grad<E::K>(a, rows, stream)) return *started;
      }
      return start<FastPairGrad<E, CHUNKS>>(a, rows, stream);
    }
  }
  return start<PairGrad<E, CHUNKS>>(a, rows, stream);
}

template <class E, bool CHUNKS> const char* either(bool grad, const Sweep& a, int rows, void* stream) {
  return grad ? gradient<E, CHUNKS>(a, rows, stream) : sums<E, CHUNKS>(a, rows, stream);
}

template <> const char* sweep<ALPHACL_DTYPE>(bool grad, const Sweep& a, int rows, void* stream) {
  using Choice = Engines<ALPHACL_DTYPE>;
  constexpr int LARGEST = largest_features(ALPHACL_DTYPE);
  using Chunk = typename Choice::template Engine<chunk_features(ALPHACL_DTYPE)>;
  if (a.flags & IN_CHUNKS) return either<Chunk, true>(grad, a, rows, stream);
  if constexpr (LARGEST == 32) {
    if (a.dim <= 32) return either<typename Choice::template Engine<32>, false>(grad, a, rows, stream);
  }
  if constexpr (LARGEST >= 64) {
    if (a.dim <= 64) return either<typename Choice::template Engine<64>, false>(grad, a, rows, stream);
  }
  if constexpr (LARGEST >= 128) {
    if (a.dim <= 128) return either<typename Choice::template Engine<128>, false>(grad, a, rows, stream);
  }
  if constexpr (LARGEST >= 256) {
    if (a.dim <= 256) return either<typename Choice::template Engine<256>, false>(grad, a, rows, stream);
  }
  return "rows of this length come in chunks of features";
}

template <class E> bool device_has_hopper() {
  if constexpr (E::BOTH_SIDES) return device::runs_hopper<hopper::PairGrad<64, true>>();
  return false;
}
template <> bool has_hopper<ALPHACL_DTYPE>() { return device_has_hopper<Engines<ALPHACL_DTYPE>::Engine<64>>(); }

template <> const char* rows<ALPHACL_DTYPE>(bool finish, const PairRows& a, void* stream) {
  using Row = typename Engines<ALPHACL_DTYPE>::Row;
  const int blocks = int((a.n_pairs + ROW_WARPS - 1) / ROW_WARPS);
  return finish ? device::launch<FinishRows<Row>>(blocks, 1, 0, a, stream) : device::launch<UnitRows<Row>>(blocks, 1, 0, a, stream);
}

}  // namespace alphacl
