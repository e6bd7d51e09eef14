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

template <class K> const char* start(const Sweep& a, void* stream) {
  if (a.side != SIDE) return NOT_SERVED;
  return device::launch<K>(a.row_blocks, a.splits, K::SHARED, a, stream);
}

template <class E, bool CHUNKS> const char* row_sums(const Sweep& a, void* stream) {
  if constexpr (E::TENSOR_CORES) {
    const bool f = a.row_of_term[F] >= 0, f_moment = a.row_of_term[F_MOMENT] >= 0;
    if (a.form == Form::CONSTANT && is_fast(a) && all_meet(a) && !a.bias && f && f + f_moment == a.terms) {
      if constexpr (!CHUNKS) {
        if (const auto started = hopper::row_sums<E::K, E::FACTORS>(a, stream)) return *started;
      }
      if (!a.symmetric) return start<FastRowSums<E, CHUNKS, false>>(a, stream);
      if constexpr (E::IS_BF16) return start<FastRowSums<E, CHUNKS, true>>(a, stream);
    }
  }
  if (a.symmetric && a.form == Form::ONLINE) return "the online form has no symmetric tiles";
  return start<RowSums<E, CHUNKS>>(a, stream);
}

template <class E, bool CHUNKS> const char* pair_grad(const Sweep& a, void* stream) {
  const bool sums_only = a.gradient == Gradient::NONE;
  if (!sums_only && a.gradient != (CHUNKS ? Gradient::WEIGHTS : Gradient::PRODUCT))
    return "rows of this length take the other gradient";
  if (a.symmetric) return "pair_grad has no symmetric tiles";
  if constexpr (E::TENSOR_CORES) {
    const bool gradient_alone = !a.terms && !a.weight_sums && !sums_only;
    if (a.form == Form::CONSTANT && is_fast(a) && all_meet(a) && !a.bias && a.weight == WEIGHT_F && gradient_alone) {
      if constexpr (!CHUNKS) {
        if (const auto started = hopper::pair_grad<E::K, E::FACTORS>(a, stream)) return *started;
      }
      return start<FastPairGrad<E, CHUNKS>>(a, stream);
    }
  }
  return start<PairGrad<E, CHUNKS>>(a, stream);
}

template <class E, bool CHUNKS> const char* either(const Sweep& a, void* stream) {
  return a.pair_grad ? pair_grad<E, CHUNKS>(a, stream) : row_sums<E, CHUNKS>(a, stream);
}

// The kernels whose tiles hold the fewest features from K on that rows of this length fit into.
template <int K> const char* whole_rows(const Sweep& a, void* stream) {
  if (a.dim <= K) return either<typename Engines<ALPHACL_DTYPE>::template Engine<K>, false>(a, stream);
  if constexpr (2 * K <= largest_features(ALPHACL_DTYPE)) return whole_rows<2 * K>(a, stream);
  return "rows of this length come in chunks of features";
}

template <> const char* sweep<ALPHACL_DTYPE>(const Sweep& a, void* stream) {
  constexpr int CHUNK = chunk_features(ALPHACL_DTYPE), LARGEST = largest_features(ALPHACL_DTYPE);
  if (a.in_chunks) return either<typename Engines<ALPHACL_DTYPE>::template Engine<CHUNK>, true>(a, stream);
  return whole_rows<LARGEST < 64 ? LARGEST : 64>(a, stream);
}

template <class E> bool device_has_hopper() {
  if constexpr (E::TENSOR_CORES) return device::runs_hopper<hopper::PairGrad<64, true, E::FACTORS>>();
  return false;
}
template <> bool has_hopper<ALPHACL_DTYPE>() { return device_has_hopper<Engines<ALPHACL_DTYPE>::Engine<64>>(); }

template <> const char* why_not<ALPHACL_DTYPE>() {
  return device::why_not<UnitRows<typename Engines<ALPHACL_DTYPE>::Row>>();
}

template <> const char* rows<ALPHACL_DTYPE>(bool finish, const PairRows& a, void* stream) {
  using Row = typename Engines<ALPHACL_DTYPE>::Row;
  const int blocks = int((a.n_pairs + ROW_WARPS - 1) / ROW_WARPS);
  return finish ? device::launch<FinishRows<Row>>(blocks, 1, 0, a, stream) : device::launch<UnitRows<Row>>(blocks, 1, 0, a, stream);
}

template <Dtype DTYPE> const char* start_rounding(const RoundedRows& a, void* stream) {
  const int blocks = int((a.n + ROW_WARPS - 1) / ROW_WARPS);
  if constexpr (DTYPE == TFLOAT32) return device::launch<RoundRows>(blocks, 1, 0, a, stream);
  return "rows of this dtype are not rounded";
}
template <> const char* rounded_rows<ALPHACL_DTYPE>(const RoundedRows& a, void* stream) {
  return start_rounding<ALPHACL_DTYPE>(a, stream);
}

}  // namespace alphacl
