/// Arguments as `execve` takes them: NUL-terminated strings one behind the other, and pointers to them with nil at the end.
package enum ArgumentVector {
  /// Lends the vector to `body`; it lives unchanged for the call and no longer.
  package static func lend<Result>(
    _ arguments: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>?) -> Result
  ) -> Result {
    let text = arguments.flatMap { Array($0.utf8CString) }
    // SAFETY: all pointers are into `text`, which outlives the call of `body`; exec does not write to it.
    return unsafe text.withUnsafeBufferPointer { bytes in
      var pointers: [UnsafeMutablePointer<CChar>?] = unsafe []
      var offset = 0
      for argument in arguments {
        unsafe pointers.append(bytes.baseAddress.map { unsafe UnsafeMutablePointer(mutating: $0 + offset) })
        offset += argument.utf8.count + 1
      }
      unsafe pointers.append(nil)
      return unsafe pointers.withUnsafeBufferPointer { unsafe body($0.baseAddress) }
    }
  }
}
