// Products of rows with packed weights, attention over a paged KV cache, and what a sampler asks of
// rows of logits, on a CPU.
//
// cpu_kernels.py builds this file and says what its handlers take and return. What they call is in
// cpu_products.h, cpu_attention.h and cpu_rows.h.
//
// The same bits: a row of y is a sum over K, a token's attention a sum over positions, and each sum
// has one order that depends on nothing but K, or on positions. Neither the number of rows, nor
// which rows share a block of registers, nor how a prompt is cut into chunks, nor the number of
// threads changes a bit. So threads divide columns, rows and heads among them, but never a sum.

#include "cpu_attention.h"
#include "cpu_products.h"
#include "cpu_rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
namespace {

using Any = ffi::AnyBuffer;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error product(Any x, Any weights, F32 scales, F32 bias, ffi::Result<F32> y, bool gelu_new) {
  Product p{};
  p.M = x.dimensions()[0], p.K = x.dimensions()[1], p.N = y->dimensions()[1];
  p.x = x.untyped_data(), p.x_is_float32 = x.element_type() == ffi::F32;
  p.weights = (const uint8_t*)weights.untyped_data(), p.scales = scales.typed_data();
  p.bias = bias.element_count() > 0 ? bias.typed_data() : nullptr;
  p.gelu_new = gelu_new, p.y = y->typed_data();
  auto kind = weights.element_type();
  if (kind == ffi::F32) return multiply<Float32>(p, weights.size_bytes());
  if (kind == ffi::U16) return multiply<Bfloat16>(p, weights.size_bytes());
  return multiply<Int8>(p, weights.size_bytes());
}

ffi::Error first_largest(F32 x, ffi::Result<ffi::Buffer<ffi::S32>> y) {
  auto shape = x.dimensions();
  for_each_row(x.typed_data(), shape[0], shape[1], first_largest_of, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error log_sum_exp(F32 x, ffi::Result<F32> y) {
  auto shape = x.dimensions();
  for_each_row(x.typed_data(), shape[0], shape[1], log_sum_exp_of, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error paged_attention(F32 q, F32 k, F32 v, Any k_pages, Any v_pages, S32 tables,
                           S32 context_lens, S32 new_lens, S32 layer, ffi::Result<F32> y,
                           ffi::Result<Any> k_out, ffi::Result<Any> v_out, float scale) {
  Attention a{};
  a.q = q.typed_data(), a.k = k.typed_data(), a.v = v.typed_data(), a.y = y->typed_data();
  a.k_pages = k_out->untyped_data(), a.v_pages = v_out->untyped_data();
  a.is_float32 = k_pages.element_type() == ffi::F32;
  a.tables = tables.typed_data(), a.context_lens = context_lens.typed_data();
  a.new_lens = new_lens.typed_data(), a.layer = layer.typed_data()[0], a.scale = scale;
  auto pool = k_pages.dimensions();
  a.L = pool[0], a.N = pool[1], a.KV = pool[2], a.P = pool[3], a.D = pool[4];
  a.B = q.dimensions()[0], a.T = q.dimensions()[1], a.G = q.dimensions()[2] / a.KV;
  a.M = tables.dimensions()[1];
  if (a.k_pages != k_pages.untyped_data() || a.v_pages != v_pages.untyped_data()) {
    return ffi::Error::Internal("the pool is not updated in place");
  }
  if (!is_valid(a)) return ffi::Error::InvalidArgument("a layer, length or page lies outside");
  attend_all(a);
  return ffi::Error::Success();
}

}  // namespace

extern "C" int panel_columns() { return PANEL; }

// Prepare this process, whose calls `helpers` threads besides the caller's may compute.
extern "C" void start(int helpers) {
  ask_for_tiles();
  team.start(helpers);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_handler, product,
                              ffi::Ffi::Bind().Arg<Any>().Arg<Any>().Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Attr<bool>("gelu_new"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_handler, paged_attention,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Arg<Any>()
                                  .Arg<Any>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>().Ret<Any>().Ret<Any>().Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(first_largest_handler, first_largest,
                              ffi::Ffi::Bind().Arg<F32>().Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(log_sum_exp_handler, log_sum_exp,
                              ffi::Ffi::Bind().Arg<F32>().Ret<F32>());
