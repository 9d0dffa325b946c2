// Memory of one task, not cleared, at the start of a cache line: a vector that straddles two lines costs two.
#pragma once

#include <cstddef>
#include <new>

namespace audiomae {

template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kLine))) {}
  ~Scratch() { ::operator delete(data_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

}  // namespace audiomae
